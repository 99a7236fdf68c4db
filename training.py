"""The loop that both training scripts share: train, validate, test; it can be stopped at any moment and resumed.

A run writes its own folder:

    args.json      settings, network, versions, device, data: before the first step
    log.jsonl      one JSON object per line: "run" (the data's name), then "train", "nc" (metrics) and "val"; of "nc",
                   line["meta" or "finetuned"]["nc1"]["mean"] has a value per layer of line["layers"]
    checkpoint.pt  the state at the top of a step, before its validation: --resume continues from it
    best.pt        weights with the best validation accuracy so far
    last.pt        weights after the last step; weights-STEP.pt at every --keep_every-th step
    tensorboard/   the log's scalars, with --tensorboard
    result.png     neural collapse during training, as `python plot_nc.py RUN` draws it
    result.json    test accuracy of the best weights, or of the last with --test_weights last
    timing.json    minutes and memory, which differ from run to run
    test-*.json    results of later tests (--test); controls.json: of `python -m study.controls RUN`
    .run.lock      locked while a process trains

"step" is the number of meta-steps that the weights had seen.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import device as devices
import nc_metrics
import record
from baselines import BASELINES
from device import GraphedStep, Signals, Stopped
from files import UserError, program, progress, quoted
from images import check_images
from learner import Learner
from meta import Adapted, Meta, Step
from record import Log, numbers, percent, say
from settings import MAY_CHANGE, check, meta_steps, recorded_settings
from tasks import Dataset, Sampler, cat, with_rotations

HELD_OUT_SEEDS = {"val": 1, "test": 2}  # of the tasks: the same in every run, so that runs can be compared
DRAWN = 50  # held-out tasks drawn at once; another number gives other tasks
CHECK_EVERY = 10  # on CUDA, steps between two checks for signals and failed updates: a check waits for the device


def train(args: argparse.Namespace, dataset: Dataset, network: Callable[[argparse.Namespace], Learner]) -> None:
    """Train, validate and test with these settings; with --resume continue a run, with --test test it again."""
    trains_classifier = args.learner == "classifier" and args.test is None
    with devices.memory_runs_out(_memory_remedies(args, trains_classifier)):
        device = devices.select_device(args.device)
        check(args, dataset, network)
        with devices.processes(device):
            devices.keep_memory()
            devices.set_arithmetic(args.precision, args.deterministic)
            torch.manual_seed(args.seed)
            net, data = network(args), Data(args, dataset, device)
            if earlier := args.resume or args.test:
                record.check_network(Path(earlier), net)
            if trains_classifier:
                classes = len(dataset.counts()["train"]) * data.turns("train")
                net.classes = nn.Linear(net.weights[net.classifier].shape[1], classes)
            maml = meta_of(net.to(device), args)
            if args.test is None:
                _train(maml, data)
            else:
                run = Path(args.test)
                if devices.rank() == 0:  # it may download them
                    say(f"Data: {dataset.described()}")
                    record.check_test_classes(run, args, dataset)
                    if not (run / "result.json").exists():
                        say(f"note: {run} is not finished")
                record.write_test(run, _test(maml, data, run, Signals()), args, dataset)


def _memory_remedies(args: argparse.Namespace, trains_classifier: bool) -> str:
    """What to do if memory runs out: those flags that this run can lower."""
    graph = args.device.startswith("cuda") and args.cuda_graph is not False and args.test is None
    again = f"start again with a lower --task_num (now {args.task_num}): --from_args {quoted(args.resume or '')}"
    remedies = {"give --no-cuda_graph (a graph keeps the memory of a step)": graph,
                f"lower --task_chunk (now {args.task_chunk or 'not given'})":
                not trains_classifier and args.task_chunk != 1,  # it takes all tasks of a step together
                again: args.resume,  # it keeps its --task_num and --device
                f"lower --task_num (now {args.task_num})": not args.resume and not args.test and args.task_num > 1,
                f"take another --device than {args.device}": not args.resume}
    return ", or ".join(remedy for remedy, helps in remedies.items() if helps)


def _train(maml: Meta, data: "Data") -> None:
    args, net = data.args, maml.net
    with record.lock_run(args) as out:
        finished = args.resume is not None and (out / "result.json").exists()
        if finished and record.read_args(out)["settings"]["epoch"] == args.epoch:
            longer = "" if args.lr_schedule == "cosine" else "a larger --epoch adds steps, "
            return say(f"{out} is complete; {longer}--test {quoted(out)} tests it again")
        run = _Run(maml, data, out)
        flags = ", ".join(f"{name}={value}" for name, value in recorded_settings(args).items())
        kept = [net.weights[name] for name in net.head] if args.freeze_head or args.learner in BASELINES else []
        parameters = sum(map(Tensor.numel, net.parameters())) - sum(map(Tensor.numel, kept))
        say(f"{flags}\n{net}\nTotal trainable parameters: {parameters}\nData: {data.dataset.described()}. {run.steps} "
            f"meta-steps of {args.task_num} tasks on {args.device}, to {out}")
        with run.signals:
            try:
                run.train()
                run.test()
            except Stopped:
                say(f"stopped at step {maml.step}; resume with: {program(args.script)} --resume {quoted(out)}")
                raise


def meta_of(net: Learner, args: argparse.Namespace) -> Meta:
    """MAML with a run's settings."""
    return Meta(net, update_lr=args.update_lr, meta_lr=args.meta_lr, update_step=args.update_step,
                update_step_test=args.update_step_test, first_order=args.first_order, nc_every=args.nc_every,
                nc_every_late=args.nc_every_late, task_chunk=args.task_chunk, seed=args.seed,
                clip=args.clip, skip_nonfinite=args.skip_nonfinite, learner=args.learner, head_lr=args.head_lr,
                freeze_head=args.freeze_head, adapt_blocks=args.adapt_blocks, keep_norms=args.keep_norms,
                cosine_steps=meta_steps(args) if args.lr_schedule == "cosine" else 0)


class Data:
    """The images of each split, and samplers of tasks from them."""

    def __init__(self, args: argparse.Namespace, dataset: Dataset, device: torch.device):
        self.args, self.dataset, self.device = args, dataset, device

    def read(self, split: str) -> Tensor:
        """uint8 [class, image, c, h, w] on the host; of several processes, the first decodes the images for all."""
        if devices.rank() > 0:
            devices.wait()
        images = check_images(self.dataset.load(split), self.dataset, split, self.args.imgsz)
        if devices.rank() == 0:
            devices.wait()
        return images

    def load(self, split: str) -> Tensor:
        """uint8 [class * turns, image, c, h, w] on the device; on the host if it needs over half of the free memory."""
        images = self.read(split)
        if self.args.random_labels and split == "train":
            order = torch.Generator().manual_seed(self.args.seed)
            images = images.flatten(0, 1)[torch.randperm(images.shape[:2].numel(), generator=order)].view_as(images)
        if self.turns(split) > 1:
            images = with_rotations(images)
        large = self.device.type == "cuda" and images.numel() > torch.cuda.mem_get_info(self.device)[0] / 2
        if any(devices.gather_lists([large])):  # in all processes, or they would draw different tasks
            what = "; steps are not captured as a CUDA graph" if split == "train" else ""
            say(f"the {split} images stay on the host: {images.numel() / 2**30:.1f} GiB{what}")
            return images
        return images.to(self.device)

    def sampler(self, split: str, images: Tensor) -> Sampler:
        args, trains = self.args, split == "train"
        queries = args.k_qry if trains else args.k_qry_test or args.k_qry
        return Sampler(images, self.dataset, self.device, HELD_OUT_SEEDS.get(split, args.seed), args.n_way, args.k_spt,
                       queries, self.turns(split), on_device=trains, nc_qry=args.nc_qry,
                       counts=self.dataset.counts()[split])

    def turns(self, split: str) -> int:
        """Orientations of each class, 4 or 1; not all scripts have rotations."""
        return 4 if getattr(self.args, "rotations" if split == "train" else "rotate_heldout", False) else 1


class _Run:
    """A training run: new, or restored from the checkpoint in its folder."""

    def __init__(self, maml: Meta, data: Data, out: Path):
        args, dataset = data.args, data.dataset
        self.args, self.maml, self.data, self.out = args, maml, data, out
        self.steps, self.device, self.signals = meta_steps(args), data.device, Signals()
        self.best: dict | None = None  # what best.pt holds
        self.log: Log | None = None
        self.minutes, self.log_bytes = 0.0, 0  # of the processes before this one
        path, self.repeat = out / "checkpoint.pt", f"{program(args.script)} --from_args {quoted(out)}"
        remedy = f"start again: {self.repeat}"
        saved = None if args.resume is None else checkpoint.read(path, f"put it back, or {remedy}")
        train_images, self.held_out = data.load("train"), data.load("val")
        data.read("test")  # a fault in them is reported before training
        self.sampler = data.sampler("train", train_images)
        self.meta_step = self.eager_step
        if args.cuda_graph is not False and train_images.is_cuda:
            self.meta_step = GraphedStep(maml, self.eager_step, self.sampler.generator, required=bool(args.cuda_graph))
        splits = {split: {"classes": len(counts), "images_per_class": min(counts), "images": sum(counts),
                          "classes_digest": dataset.digest(split)} for split, counts in dataset.counts().items()}
        recorded = recorded_settings(args)
        kept = {name: value for name, value in recorded.items() if name not in (*MAY_CHANGE["resume"], "out")}
        self.experiment = kept | {  # what a checkpoint shares with the run that resumes from it
            f"{key} of {split}": value for split, about in splits.items() for key, value in about.items()} | {
            "device": self.device.type, "images on": train_images.device.type}
        self.started = time.perf_counter()
        if saved is None:
            self.save()  # before args.json: a folder with args.json is a run, and a run has a checkpoint
            described = {"name": dataset.name(), "synthetic": args.synthetic, "splits": splits,
                         "found": dataset.found()}
            record.write_args(out, recorded, self.steps, maml.net.config, described, self.device)
        else:
            self.best, self.minutes, self.log_bytes = checkpoint.restore(path, saved, self.experiment, maml,
                                                                         self.sampler, remedy)
            record.resumed(out, args.epoch, maml.step, self.steps, self.log_bytes)
            if self.best is not None:
                checkpoint.write(out / "best.pt", self.best)

    def train(self) -> None:
        """Train to the last step, whose weights stay in place."""
        board = record.tensorboard(self.out, self.maml.step) if self.args.tensorboard else None
        with Log(self.out / "log.jsonl", self.log_bytes, board) as self.log, \
                progress(None, "", self.steps, "steps", delay=0, initial=self.maml.step,
                         disable=devices.rank() > 0) as self.bar:
            if not self.log_bytes:
                self.log.add("run", 0, data=self.data.dataset.name())
            try:
                self.loop()
            except Stopped:
                self.save()
                raise
            finally:
                self.meta_step = None  # NCCL waits for graphs with its collectives when processes part

    def loop(self) -> None:
        args, maml = self.args, self.maml
        for step in range(maml.step, self.steps):
            checks = self.device.type == "cpu" or step % CHECK_EVERY == 0
            show = step % args.print_every == 0
            if args.save_every and step % args.save_every == 0:
                self.save()
            if checks:
                self.signals.check(self.device)
            if step % args.eval_every == 0:
                self.validate()
            if args.keep_every and step % args.keep_every == 0:
                self.save_weights(f"weights-{step}.pt")
            result = self.meta_step(every_step=show)
            if checks or show or result.metrics:
                self.stop_if_not_finite()
                self.report(step, result, show)
            self.bar.update()
        self.save()
        self.save_weights("last.pt", val_accuracy=self.validate())

    def eager_step(self, every_step: bool = False) -> Step:
        """Draw tasks and take one meta-step."""
        index = self.sampler.draw(self.args.task_num)
        other_queries = self.maml.measures_next and self.sampler.nc_qry != self.sampler.k_qry
        measured = self.sampler.gather(index, measured=True) if other_queries else None
        classes = index[0][..., 0].to(self.device)  # [T, n_way]
        return self.maml(self.sampler.gather(index), every_step, measured, classes)

    def report(self, step: int, result: Step, show: bool) -> None:
        """Put a step's loss on the bar and its metrics into the log; with `show` log and print its accuracy."""
        loss = result.losses.mean()
        self.bar.set_postfix(loss=f"{loss:.3f}", acc=f"{result.accuracy[:, -1].mean():.1%}", refresh=False)
        if show:
            skipped = {"skipped": self.skipped()} if self.args.skip_nonfinite else {}
            accuracy = result.accuracy.mean(0)
            self.log.add("train", step, loss=loss, acc=accuracy, **skipped)
            say(f"step: {step} \ttraining acc: {percent(accuracy)}")
        if result.metrics:
            self.log.metrics(step, "train", self.maml.net.blocks, result.metrics)

    def save(self) -> None:
        """Write a checkpoint. The log is flushed first: it must never be shorter than the checkpoint says."""
        self.stop_if_not_finite()
        log_bytes = self.log.sync() if self.log else self.log_bytes
        checkpoint.save(self.out / "checkpoint.pt", self.maml, {
            "tasks": self.sampler.generator.get_state(), "best": self.best, "log_bytes": log_bytes,
            "minutes": self.minutes_in_all(), "experiment": self.experiment})

    def stop_if_not_finite(self) -> None:
        """Raise a UserError that names the step whose update was skipped, if one was; not with --skip_nonfinite."""
        args = self.args
        if not args.skip_nonfinite and self.skipped():
            step = int(self.maml.updates)  # the first whose update was skipped: none was made after it
            inner = "" if args.learner in BASELINES else f"--update_lr ({args.update_lr}) or "
            raise UserError(f"step {step}: a loss, the gradient or the update is not finite. Lower {inner}--meta_lr "
                            f"({args.meta_lr}), or skip such updates, if they are rare: {self.repeat} --skip_nonfinite")

    def skipped(self) -> int:
        """How many updates were skipped; waits for the device."""
        return self.maml.step - int(self.maml.updates)

    def validate(self) -> float:
        """Validate, log, keep the weights if they are the best so far; returns their accuracy."""
        args, maml = self.args, self.maml
        self.stop_if_not_finite()
        alone_steps = () if args.transductive else range(args.update_step_test + 1)
        adapted = _evaluate(maml, self.data, "val", self.held_out, args.eval_tasks, self.signals, alone_steps,
                            measure=args.nc_every > 0)
        mean, interval, nearest, _ = _accuracies(adapted, args.transductive)
        self.log.add("val", maml.step, acc=mean, ci95=interval, tasks=len(adapted.accuracy), nearest_mean=nearest)
        if adapted.metrics is not None:
            self.log.metrics(maml.step, "heldout", maml.net.blocks, adapted.metrics)
        accuracy = float(nearest[0] if args.learner in BASELINES else mean[-1])
        say(f"step: {maml.step} \tvalidation acc, % after 0 to {args.update_step_test} inner steps: {percent(mean)} "
            f"(last ± {100 * interval[-1]:.1f}); nearest support mean: {percent(nearest)}")
        if self.best is None or accuracy > self.best["val_accuracy"]:
            self.best = self.save_weights("best.pt", val_accuracy=accuracy)
        return accuracy

    def save_weights(self, name: str, **more: float) -> dict:
        """Write a copy of the weights to a file in the run's folder; returns what the file holds."""
        self.stop_if_not_finite()
        weights = {key: weight.cpu().clone() for key, weight in self.maml.net.state_dict().items()}
        content = {"weights": weights, "step": self.maml.step} | more
        checkpoint.write(self.out / name, content)
        return content

    def test(self) -> None:
        """Test the weights. result.json is written last: it makes the run complete."""
        minutes = self.minutes_in_all()
        self.sampler = self.held_out = None  # room for the test images
        result = _test(self.maml, self.data, self.out, self.signals)
        skipped = self.skipped()
        if self.args.skip_nonfinite:
            result["skipped_updates"] = skipped
        memory = devices.peak_memory(self.device)
        if self.args.nc_every:
            record.draw_figure(self.out)
        timing = {"training_minutes": round(minutes, 2), "meta_steps": self.steps, "peak_memory_gb": memory}
        record.write_json(self.out / "timing.json", timing)
        record.write_json(self.out / "result.json", result)
        peak = "" if memory is None else f", peak memory {memory} GiB"
        unmade = f", {skipped} without an update (not finite)" if skipped else ""
        say(f"{minutes:.1f} minutes for {self.steps} meta-steps{unmade}{peak}; results in {self.out}")

    def minutes_in_all(self) -> float:
        return self.minutes + (time.perf_counter() - self.started) / 60


def held_out_tasks(sampler: Sampler, n_tasks: int, size: int) -> Iterator[tuple[int, tuple]]:
    """The sampler's first `n_tasks` tasks, `size` at a time: the number of the first, and the indices to gather."""
    index = cat([sampler.draw(DRAWN) for _ in range(0, n_tasks, DRAWN)])
    for start in range(0, n_tasks, size):
        yield start, tuple(values[start:min(start + size, n_tasks)] for values in index)


def _evaluate(maml: Meta, data: Data, split: str, images: Tensor, n_tasks: int, signals: Signals,
              nontransductive: Sequence[int], measure: bool = False) -> Adapted:
    """`maml.finetune` on `n_tasks` tasks, the same on every device, as many at a time as in training."""
    sampler, size, results = data.sampler(split, images), data.args.task_num, []
    hidden = devices.rank() > 0 or split == "val" and sys.stderr.isatty()  # on a terminal, training's bar stays
    batches = progress(held_out_tasks(sampler, n_tasks, size), "testing" if split == "test" else "validating",
                       math.ceil(n_tasks / size), "batches", disable=hidden)
    for i, (start, part) in enumerate(batches):
        if i % devices.size() == 0:
            signals.check(data.device)
        if i % devices.size() == devices.rank():
            measured = sampler.gather(part, measured=True) if measure else None
            results.append(maml.finetune(sampler.gather(part), measured, maml.seed + start, nontransductive,
                                         every_query=not data.args.transductive))
    return cat(devices.gather_lists(results))


def _accuracies(adapted: Adapted, transductive: bool) -> list[Tensor]:
    """Mean accuracy over tasks and half its 95% interval (normal), then both for the nearest support mean; each [K+1],
    or one value per inner step that was answered without transduction."""
    answers = adapted._asdict() if transductive else adapted.nontransductive
    mean_and_se = [nc_metrics.mean_and_se(answers[name]) for name in ("accuracy", "nearest_mean")]
    return [values for mean, se in mean_and_se for values in (mean, 1.96 * se)]


def _test(maml: Meta, data: Data, run: Path, signals: Signals) -> dict:
    """Test a run's best or last weights on the test classes, transductive and not; returns what result.json holds."""
    args, last_step = data.args, data.args.update_step_test
    all_steps = list(range(last_step + 1))
    alone_steps = [0, last_step] if args.transductive else all_steps  # one query at a time takes long
    devices.wait()  # for the process that writes the weights
    step, val_accuracy = checkpoint.load_weights(run, args.test_weights, maml.net)
    classes = len(data.dataset.counts()["test"])
    say(f"testing on {args.test_tasks} tasks of the {classes} test classes of {data.dataset.name()}")
    adapted = _evaluate(maml, data, "test", data.load("test"), args.test_tasks, signals, alone_steps)
    result = {"data": data.dataset.name(), "test_classes": classes}
    for name, transductive in (("test", True), ("test_nontransductive", False)):
        mean, interval, nearest, nearest_interval = _accuracies(adapted, transductive)
        steps = all_steps if transductive else alone_steps
        queries = 1 if args.transductive and not transductive else args.k_qry_test or args.k_qry
        result[name] = {
            "accuracy": numbers(mean), "ci95": numbers(interval), "nearest_mean": numbers(nearest),
            "nearest_mean_ci95": numbers(nearest_interval), "inner_steps": steps, "tasks": args.test_tasks,
            "n_way": args.n_way, "k_spt": args.k_spt, "k_qry": queries}
        how = "queries together" if transductive else "each query with the support set alone"
        own = " (this learner's own rule)" if args.learner in BASELINES else ""
        say(f"test accuracy on {result['data']}, {args.n_way}-way {args.k_spt}-shot, {how}: after {last_step} inner "
            f"steps {100 * mean[-1]:.2f}% ± {100 * interval[-1]:.2f}, nearest support mean before "
            f"adaptation{own} {100 * nearest[0]:.2f}% ± {100 * nearest_interval[0]:.2f} (95%, {args.test_tasks} tasks, "
            f"{'1 query' if queries == 1 else f'{queries} queries'} per class, {args.test_weights}.pt, "
            f"step {step})\nafter {', '.join(map(str, steps))} inner steps: {percent(mean)}")
    return result | {f"{args.test_weights}_step": step, "val_accuracy": numbers(val_accuracy)}
