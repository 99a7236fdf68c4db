"""The loop that both training scripts share: train, validate, test; it can be stopped at any moment and resumed.

A run writes its own folder:

    args.json      every setting, versions, device, data: before the first step
    log.jsonl      one JSON object per line: "run" (the data's name), then "train", "nc" (metrics) and "val"
    checkpoint.pt  the run's state, every --save_every steps and when it is stopped: --resume continues from it
    best.pt        weights with the best validation accuracy so far
    last.pt        weights after the last step; weights-STEP.pt at every --keep_every-th step
    nonfinite.pt   where a loss was not finite: the weights and tasks that gave it
    tensorboard/   the log's scalars, with --tensorboard
    figure.png     neural collapse while it trained, as `python plot_nc.py RUN` draws it
    result.json    test accuracy of the best weights, at the end
    timing.json    minutes and memory, apart from what the seed determines

"step" is the number of meta-steps that the weights had seen. Everything in a checkpoint is as it was at the
top of a step, before that step's validation: a run that goes on from it does and logs what the first one would have.
"""

import argparse
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
from device import GraphedStep, keep_memory, memory_runs_out, peak_memory, processes, select_device, set_arithmetic
from files import UserError
from images import check_images
from interrupt import Interrupted, Signals
from learner import Learner
from meta import Adapted, Meta, Step
from record import Log, numbers, percent, say
from settings import check, experiment, meta_steps, recorded_settings
from tasks import Dataset, Sampler, cat, with_rotations

VAL_SEED, TEST_SEED = 1, 2  # of the held-out tasks: the same for every run, so that runs compare on the same tasks
DRAWN = 50  # held-out tasks drawn at once; another number gives other tasks
CHECK_EVERY = 10  # steps on CUDA between two waits for the device, to see whether an update failed


def train(args: argparse.Namespace, dataset: Dataset, network: Callable[[argparse.Namespace], Learner]) -> None:
    """Train, validate and test as the settings say; resume a run, or test a finished one again."""
    remedy = (f"lower --task_chunk (now {args.task_chunk or 'as fits the device'}) to hold fewer tasks at once, "
              f"or take another --device than {args.device}")
    with Signals() as signals, memory_runs_out(remedy):
        device = select_device(args.device)
        sizes = check(args, dataset, network)
        stopped = None
        with processes(device):
            try:
                _train(args, dataset, sizes, network, device, signals)
            except Interrupted as interrupted:  # in all processes at once: they leave together
                stopped = interrupted
        if stopped:
            raise stopped


def _train(args: argparse.Namespace, dataset: Dataset, sizes: dict, network: Callable[[argparse.Namespace], Learner],
           device: torch.device, signals: Signals) -> None:
    keep_memory()
    set_arithmetic(args.precision, args.deterministic)
    torch.manual_seed(args.seed)
    net, data = network(args), Data(args, dataset, device)
    if args.learner == "classifier":
        net.classes = nn.Linear(net.weights[net.classifier].shape[1], sizes["train"][0] * data.turns("train"))
    net.to(device)
    maml = Meta(net, args.update_lr, args.meta_lr, args.update_step, args.update_step_test, args.first_order,
                args.nc_every, args.task_chunk, args.seed, args.nc_every_late, args.clip, args.skip_nonfinite,
                args.learner, cosine_steps=meta_steps(args) if args.lr_schedule == "cosine" else 0)
    if args.test is not None:
        return _test_again(args, maml, data, signals)
    out = record.folder(args)
    with record.lock_run(out):
        if args.resume is not None and record.complete(out, args.epoch):
            return say(f"{out} is complete; more steps with a larger --epoch, another test with --test {out}")
        run = _Run(args, maml, data, sizes, out, signals)
        say(_banner(args, net, dataset, run.steps, out))
        try:
            run.train()
            run.test()
        except Interrupted:
            say(f"stopped at step {maml.step}; go on with: python {args.script}.py --resume {out}")
            raise


class Data:
    """The images of each split, and samplers of tasks from them."""

    def __init__(self, args: argparse.Namespace, dataset: Dataset, device: torch.device):
        self.args, self.dataset, self.device = args, dataset, device

    def load(self, split: str) -> Tensor:
        """uint8 [class, image, c, h, w] on the device, or on the host where it would take over half of what is free."""
        images = check_images(self.dataset.load(split), self.dataset, split, self.args.imgsz)
        if self.turns(split) > 1:
            images = with_rotations(images)
        if self.device.type == "cuda" and images.numel() > torch.cuda.mem_get_info(self.device)[0] / 2:
            say(f"the {split} images stay on the host: {images.numel() / 2**30:.1f} GB")
            return images
        return images.to(self.device)

    def sampler(self, split: str, images: Tensor, seed: int) -> Sampler:
        args, trains = self.args, split == "train"
        return Sampler(images, self.dataset, self.device, seed, args.n_way, args.k_spt,
                       args.k_qry if trains else self.heldout_queries, self.turns(split),
                       on_device=trains, nc_qry=args.nc_qry, counts=self.dataset.counts(split))

    @property
    def heldout_queries(self) -> int:
        """Query images per class in validation and testing."""
        return self.args.k_qry if self.args.k_qry_test is None else self.args.k_qry_test

    def turns(self, split: str) -> int:
        """Orientations of each class, 4 or 1; not all scripts have rotations."""
        return 4 if getattr(self.args, "rotations" if split == "train" else "rotate_heldout", False) else 1


class _Run:
    """A training run: what it has besides its Meta, and what it does."""

    def __init__(self, args: argparse.Namespace, maml: Meta, data: Data, sizes: dict, out: Path, signals: Signals):
        self.args, self.maml, self.data, self.out, self.signals = args, maml, data, out, signals
        self.steps, self.device = meta_steps(args), data.device
        self.best: dict | None = None  # what best.pt holds
        self.val_accuracy: float | None = None  # of the last validation
        self.minutes, self.log_bytes = 0.0, 0  # of the processes before this one
        resumes = args.resume is not None
        found = checkpoint.load(out / "checkpoint.pt", self.device, self._restart()) if resumes else None
        images, self.held_out = data.load("train"), data.load("val")
        check_images(data.dataset.load("test"), data.dataset, "test", args.imgsz)  # its faults are said before training
        self.sampler = data.sampler("train", images, args.seed)
        replays = args.cuda_graph and self.device.type == "cuda" and images.is_cuda
        self.meta_step = GraphedStep(maml, self._eager_step, self.sampler.generator) if replays else self._eager_step
        described = {"name": data.dataset.name, "synthetic": args.synthetic, "splits": {
            split: {"classes": classes, "images_per_class": count} for split, (classes, count) in sizes.items()}}
        self.experiment = experiment(args) | {
            "data": described, "device": self.device.type, "images on": images.device.type}
        if args.resume is None:
            record.write_args(out, recorded_settings(args), self.steps, described | {"found": data.dataset.found},
                              self.device)
        else:
            self._restore(found)
        self.last_checked = maml.step, self.sampler.state
        self.started = time.perf_counter()

    def _restore(self, found: dict | None) -> None:
        """Restores the checkpoint, or starts from scratch if there is none."""
        if found is not None:
            checkpoint.restore(self.out / "checkpoint.pt", found, self.experiment, self.maml, self.sampler,
                               self._restart())
            self.best, self.minutes, self.log_bytes = found["best"], found["minutes"], found["log_bytes"]
        elif record.lines(self.out) > 1:
            raise UserError(f"{self.out / 'checkpoint.pt'} is missing; {self._restart()}")
        record.extend_run(self.out, self.args.epoch, self.steps)
        if self.best is not None:
            checkpoint.write(self.out / "best.pt", self.best)
        elif devices.rank() == 0:
            record.remove(self.out / "best.pt")

    def _restart(self) -> str:
        return f"put it back, or start again: python {self.args.script}.py --from_args {self.out / 'args.json'}"

    def train(self) -> None:
        """The loop. It leaves the weights of the last step in place, and a checkpoint of them."""
        args, maml = self.args, self.maml
        board = record.tensorboard(self.out, maml.step) if args.tensorboard else None
        with Log(self.out / "log.jsonl", self.log_bytes, board) as log, record.progress(self.steps, maml.step) as bar, \
                self.signals.noted():
            if not self.log_bytes:
                log.add("run", 0, data=self.data.dataset.name)
            try:
                for step in range(maml.step, self.steps):
                    checks = step % CHECK_EVERY == 0 or self.device.type == "cpu"
                    if step == 0 or args.save_every and step % args.save_every == 0:
                        self.save(log)
                    if checks:
                        self.signals.check(self.device)
                    if step % args.eval_every == 0:
                        self.validate(log)
                    if args.keep_every and step % args.keep_every == 0:
                        self.keep(f"weights-{step}.pt")
                    shown = step % args.print_every == 0
                    seen = self.meta_step(shown)
                    if checks or shown or seen.metrics:
                        self.stop_if_not_finite()
                        self.report(log, bar, step, seen, shown)
                    bar.update()
                self.save(log)
                self.validate(log)
                self.keep("last.pt", val_accuracy=self.val_accuracy)
            except Interrupted:
                self.save(log)
                raise
        self.signals.check(self.device)

    def _eager_step(self, every_step: bool = False) -> Step:
        index, apart = self.sampler.draw(self.args.task_num), self.sampler.nc_qry != self.sampler.k_qry
        measured = self.sampler.gather(index, measured=True) if apart and self.maml.measures_next else None
        return self.maml(self.sampler.gather(index), every_step, measured, index[0][..., 0].to(self.device))

    def report(self, log: Log, bar, step: int, seen: Step, shown: bool) -> None:
        loss = seen.losses.mean()
        bar.set_postfix(loss=f"{loss:.3f}", acc=f"{seen.accuracy[:, -1].mean():.3f}", refresh=False)
        if shown:
            skipped = {"skipped": self.skipped()} if self.args.skip_nonfinite else {}
            log.add("train", step, loss=loss, acc=seen.accuracy.mean(0), **skipped)
            say(f"step: {step} \ttraining acc: {percent(seen.accuracy.mean(0))}")
        if seen.metrics:
            log.metrics(step, "train", self.maml.net.blocks, seen.metrics)

    def save(self, log: Log) -> None:
        """Write a checkpoint: the log first, for it must never be shorter than a checkpoint says."""
        self.stop_if_not_finite()
        checkpoint.save(self.out / "checkpoint.pt", self.maml, {
            "tasks": self.sampler.state, "best": self.best, "log_bytes": log.sync(), "minutes": self._minutes(),
            "of": self.experiment})

    def stop_if_not_finite(self) -> None:
        """Stop the run if an update since the last check was not made, because something in it was not finite."""
        if not self.args.skip_nonfinite and self.skipped():
            self._stop_at(int(self.maml.updates))
        self.last_checked = self.maml.step, self.sampler.state

    def skipped(self) -> int:
        """Updates that were not made; it waits for the device."""
        return self.maml.step - int(self.maml.updates)

    def _stop_at(self, step: int) -> None:
        """Draw that step's tasks again, keep them with the weights, which no later step has changed, and say why."""
        args, path = self.args, self.out / "nonfinite.pt"
        checked, self.sampler.state = self.last_checked
        for _ in range(step - checked):
            self.sampler.draw(args.task_num)
        index = self.sampler.draw(args.task_num)
        tasks = self.sampler.gather(index)
        losses = self.maml.losses(tasks, index[0][..., 0].to(self.device))
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        checkpoint.write(path, {"step": step, "weights": self.maml.net.state_dict(),
                                "adam": self.maml.optimizer.state_dict(), "tasks": tasks._asdict(), "losses": losses})
        what = f"the loss of task {', '.join(map(str, bad[:5]))}{', ...' * (len(bad) > 5)}" if bad else \
            "the gradient, or its square in Adam's state,"
        raise UserError(f"step {step}: {what} is not finite; its weights and tasks are in {path}. Lower --update_lr "
                        f"({args.update_lr}) or --meta_lr ({args.meta_lr}), clip the gradient with --clip, or skip "
                        f"such updates with --skip_nonfinite: "
                        f"python {args.script}.py --from_args {self.out / 'args.json'} --skip_nonfinite")

    def validate(self, log: Log) -> None:
        """Validate, log, keep the weights if they are the best yet. Interrupted, it leaves everything as it was."""
        args, maml = self.args, self.maml
        self.stop_if_not_finite()
        with self.signals.raised():
            found = _evaluate(maml, self.data, "val", self.held_out, args.eval_tasks, VAL_SEED, self.signals,
                              measure=args.nc_every > 0,
                              nontransductive=() if args.transductive else range(args.update_step_test + 1))
        shown = _answers(found, args.transductive)
        mean, interval = _mean_and_interval(shown["accuracy"])
        nearest, _ = _mean_and_interval(shown["nearest_mean"])
        log.add("val", maml.step, acc=mean, ci95=interval, tasks=len(found.accuracy), nearest_mean=nearest)
        if found.metrics is not None:
            log.metrics(maml.step, "heldout", maml.net.blocks, found.metrics)
        self.val_accuracy = float(nearest[0] if args.learner in BASELINES else mean[-1])
        say(f"step: {maml.step} \tvalidation acc: {percent(mean)} (last ± {100 * interval[-1]:.1f}); "
            f"nearest support mean: {percent(nearest)}")
        if self.best is None or self.val_accuracy > self.best["val_accuracy"]:
            self.best = self.keep("best.pt", val_accuracy=self.val_accuracy)

    def keep(self, name: str, **more: float) -> dict:
        """Write the weights as they are now to a file of the run's folder; what it holds."""
        weights = {key: weight.clone() for key, weight in self.maml.net.state_dict().items()}
        kept = {"weights": weights, "step": self.maml.step} | more
        checkpoint.write(self.out / name, kept)
        return kept

    def test(self) -> None:
        """Test the best weights; what is written last makes the run complete."""
        minutes = self._minutes()
        self.sampler = self.held_out = self.meta_step = None  # room for the test images
        result = _test(self.args, self.maml, self.data, self.out, self.signals)
        if self.args.skip_nonfinite:
            result["skipped_updates"] = self.skipped()
        memory = peak_memory(self.device)
        if self.args.nc_every:
            record.draw_figure(self.out)
        record.write_json(self.out / "timing.json", {
            "training_minutes": round(minutes, 2), "meta_steps": self.steps, "peak_memory_gb": memory})
        record.write_json(self.out / "result.json", result)
        peak = "" if memory is None else f", peak memory {memory} GB"
        say(f"{minutes:.1f} minutes for {self.steps} meta-steps{peak}; results in {self.out}")

    def _minutes(self) -> float:
        return self.minutes + (time.perf_counter() - self.started) / 60


def held_out_tasks(sampler: Sampler, n_tasks: int, size: int) -> Iterator[tuple[int, tuple]]:
    """The sampler's first `n_tasks` tasks, `size` at a time: the first one's number, and indices to gather."""
    index = cat([sampler.draw(min(DRAWN, n_tasks - start)) for start in range(0, n_tasks, DRAWN)])
    for start in range(0, n_tasks, size):
        yield start, tuple(values[start:start + size] for values in index)


def _evaluate(maml: Meta, data: Data, split: str, images: Tensor, n_tasks: int, seed: int, signals: Signals,
              measure: bool = False, nontransductive: Sequence[int] = ()) -> Adapted:
    """`maml.finetune` of `n_tasks` tasks, the same for a seed on every device; as many at a time as in training."""
    sampler = data.sampler(split, images, seed)
    results = []
    for i, (start, part) in enumerate(held_out_tasks(sampler, n_tasks, data.args.task_num)):
        if i % devices.size() == 0:
            signals.check(data.device)
        if i % devices.size() == devices.rank():
            measured = sampler.gather(part, measured=True) if measure else None
            results.append(maml.finetune(sampler.gather(part), measure, maml.seed + start, measured, nontransductive,
                                         every_query=not data.args.transductive))
    return cat(devices.gather_lists(results))


def _test(args: argparse.Namespace, maml: Meta, data: Data, run: Path, signals: Signals) -> dict:
    """Test accuracy of a run's best or last weights on the test classes, transductive and not."""
    path = run / f"{args.test_weights}.pt"
    devices.wait()  # for the process that writes it
    kept = checkpoint.load_weights(path, maml.net, data.device,
                                   f"the run hasn't got there yet; continue it with --resume {run}", validated=True)
    step, val_accuracy = kept["step"], kept["val_accuracy"]
    say(f"testing on {args.test_tasks} tasks of the test classes")
    k = args.update_step_test
    steps = range(k + 1)
    alone = (0, k) if args.transductive else steps
    found = _evaluate(maml, data, "test", data.load("test"), args.test_tasks, TEST_SEED, signals,
                      nontransductive=alone)
    results = {}
    for name, transductive in (("test", True), ("test_nontransductive", False)):
        answers = _answers(found, transductive)
        values = {key: _mean_and_interval(accuracy) for key, accuracy in answers.items()}
        (mean, interval), (nearest, nearest_interval) = values["accuracy"], values["nearest_mean"]
        results[name] = {
            "accuracy": numbers(mean), "ci95": numbers(interval), "nearest_mean": numbers(nearest),
            "nearest_mean_ci95": numbers(nearest_interval), "inner_steps": list(steps if transductive else alone),
            "tasks": args.test_tasks, "n_way": args.n_way, "k_spt": args.k_spt,
            "k_qry": data.heldout_queries if transductive or not args.transductive else 1}
        how = "queries together" if transductive else "each query with the support set alone"
        say(f"test accuracy on {data.dataset.name}, {args.n_way}-way {args.k_spt}-shot, {how}: after {k} inner steps "
            f"{100 * mean[-1]:.2f}% ± {100 * interval[-1]:.2f}, nearest support mean before them "
            f"{100 * nearest[0]:.2f}% ± {100 * nearest_interval[0]:.2f} (95%, {args.test_tasks} tasks, "
            f"{results[name]['k_qry']} queries per class, {args.test_weights} weights, of step {step})")
        say(f"after {', '.join(map(str, results[name]['inner_steps']))} inner steps: {percent(mean)}")
    return {"data": data.dataset.name, **results, f"{args.test_weights}_step": step,
            "val_accuracy": numbers(val_accuracy)}


def _test_again(args: argparse.Namespace, maml: Meta, data: Data, signals: Signals) -> None:
    run = Path(args.test)
    result = _test(args, maml, data, run, signals)
    path = run / (f"test-{args.test_tasks}tasks-{result['test']['k_qry']}qry-{args.update_step_test}steps"
                  f"{'' if args.test_weights == 'best' else '-last'}.json")
    record.write_test(path, result)
    say(f"written to {path}")


def _answers(found: Adapted, transductive: bool) -> dict:
    """Accuracy and nearest-mean accuracy per task, [T, steps]."""
    together = {"accuracy": found.accuracy, "nearest_mean": found.nearest_mean}
    return together if transductive else found.nontransductive


def _banner(args: argparse.Namespace, net: Learner, dataset: Dataset, steps: int, out: Path) -> str:
    parameters = sum(weight.numel() for weight in net.parameters() if weight.requires_grad)
    settings = ", ".join(f"{name}={value}" for name, value in recorded_settings(args).items())
    return (f"{settings}\n{net}\nTotal trainable parameters: {parameters}\n"
            f"Data: {dataset.name}{dataset.found and f' ({dataset.found})'}. "
            f"{steps} meta-steps of {args.task_num} tasks on {args.device}, to {out}")


def _mean_and_interval(accuracy: Tensor) -> tuple[Tensor, Tensor]:
    """[tasks, steps] -> mean, and half of the 95% interval over tasks (normal)."""
    mean, se = nc_metrics.mean_and_se(accuracy)
    return mean, 1.96 * se
