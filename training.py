"""The loop that both training scripts share: train, validate, test; stop at any moment and go on.

A run writes its own folder:

    args.json      every setting, versions, device, data: before the first step
    log.jsonl      one JSON object a line: "run" (the data's name), then "train", "nc" (metrics) and "val"
    checkpoint.pt  the run's state, every --save_every steps and when it is stopped: --resume goes on from it
    best.pt        weights with the best validation accuracy so far
    nonfinite.pt   where a loss was not finite: the weights and tasks that gave it
    result.json    test accuracy of the best weights, at the end
    timing.json    minutes and memory, apart from what the seed determines

"step" is always the number of meta-steps that the weights had seen. Everything in a checkpoint is as it was at the
top of a step, before that step's validation: a run that goes on from it does and logs what the first one would have.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

import checkpoint
import device as devices
import nc_metrics
import record
from device import GraphedStep
from files import UserError
from interrupt import Interrupted, Signals
from learner import Config, Learner
from device import check_device, keep_memory, memory_runs_out, peak_memory, set_arithmetic
from meta import Meta, join
from record import Log, numbers, percent, say
from settings import check, experiment, meta_steps, recorded_settings
from splits import Dataset, Splits

VAL_SEED, TEST_SEED = 1, 2  # of the held-out tasks: the same for every run, so that runs compare on the same tasks
EVALUATION_BATCH = 50  # tasks drawn together for validation and test
LOOK_EVERY = 10  # steps on CUDA between two looks at what is only known by waiting for the device


def train(args: argparse.Namespace, dataset: Dataset, layers: Callable[[argparse.Namespace], Config]) -> None:
    """Train, validate and test as the settings say; go on with a run, or test a finished one again."""
    name = devices.local_device(args.device)
    remedy = (f"lower --task_chunk (now {args.task_chunk or 'as fits the device'}) to hold fewer tasks at once, "
              f"or take another --device than {name}")
    with Signals() as signals, memory_runs_out(remedy):
        try:
            check_device(name)
            device = torch.device(name)
            sizes = check(args, dataset, layers)
            devices.start(device)
            _train(args, dataset, sizes, layers(args), device, signals)
        except Interrupted as interrupted:
            sys.exit(interrupted.status)
        finally:
            devices.stop()


def _train(args: argparse.Namespace, dataset: Dataset, sizes: dict, config: Config, device: torch.device,
           signals: Signals) -> None:
    keep_memory()
    set_arithmetic(args.precision, args.deterministic)
    torch.manual_seed(args.seed)
    net = Learner(config, args.imgc, args.imgsz)
    net.to(device)
    maml = Meta(net, args.update_lr, args.meta_lr, args.update_step, args.update_step_test, args.first_order,
                args.nc_every, args.task_chunk, args.seed, args.nc_every_late, args.clip, args.skip_nonfinite)
    splits = Splits(args, dataset, device)
    if args.test is not None:
        return _test_again(args, maml, splits, signals)
    out = record.folder(args)
    with record.claimed(out):
        if args.resume is not None and record.complete(out, args.epoch):
            return say(f"{out} is complete; more steps with a larger --epoch, another test with --test {out}")
        run = _Run(args, maml, splits, sizes, out, signals)
        say(_banner(args, net, dataset, run.steps, out))
        try:
            run.train()
            run.test()
        except Interrupted:
            say(f"stopped at step {maml.step}; go on with: python {args.script}.py --resume {out}")
            raise


class _Run:
    """A training run: what it has besides its Meta, and what it does."""

    def __init__(self, args: argparse.Namespace, maml: Meta, splits: Splits, sizes: dict, out: Path, signals: Signals):
        self.args, self.maml, self.splits, self.out, self.signals = args, maml, splits, out, signals
        self.steps, self.device = meta_steps(args), splits.device
        self.best: dict | None = None  # what best.pt holds
        self.minutes, self.log_bytes = 0.0, 0  # before this process went on
        found = checkpoint.load(out / "checkpoint.pt", self.device, self._anew()) if args.resume is not None else None
        images, self.held_out = splits.load("train"), splits.load("val")
        splits.dataset.load("test")  # not looked at: what is wrong with it is said now, not after the training
        self.sampler = splits.sampler(images, args.seed, args.task_num)
        self.replays = self.device.type == "cuda" and args.cuda_graph and images.is_cuda
        data = {"name": splits.dataset.name, "synthetic": args.synthetic, "splits": {
            split: {"classes": classes, "images_per_class": count} for split, (classes, count) in sizes.items()}}
        self.of = experiment(args) | {"data": data, "device": self.device.type, "images on": images.device.type}
        if args.resume is None:
            record.write_args(out, recorded_settings(args), self.steps, data, self.device)
        else:
            self._go_on(found)
        self.looked = maml.step, self.sampler.state
        self.started = time.perf_counter()

    def _go_on(self, found: dict | None) -> None:
        """Take up the state that was found; None: the run was stopped before it saved one, and begins."""
        if found is not None:
            checkpoint.restore(self.out / "checkpoint.pt", found, self.of, self.maml, self.sampler, self._anew())
            self.best, self.minutes, self.log_bytes = found["best"], found["minutes"], found["log_bytes"]
        elif record.lines(self.out) > 1:
            raise UserError(f"{self.out / 'checkpoint.pt'} is missing; {self._anew()}")
        record.lengthen(self.out, self.args.epoch, self.steps)
        if self.best is not None:
            checkpoint.write(self.out / "best.pt", self.best)
        elif devices.rank() == 0:
            record.remove(self.out / "best.pt")

    def _anew(self) -> str:
        return f"put it back, or begin anew: python {self.args.script}.py --from_args {self.out / 'args.json'}"

    def train(self) -> None:
        """The loop. It leaves the weights of the last step in place, and a checkpoint of them."""
        args, maml, sample = self.args, self.maml, self.sampler
        replayed = None  # the CUDA graph of a step on which nothing is looked at
        with Log(self.out / "log.jsonl", self.log_bytes) as log, record.progress(self.steps, maml.step) as bar, \
                self.signals.noted():
            if not self.log_bytes:
                log.add("run", 0, data=self.splits.dataset.name)
            try:
                for step in range(maml.step, self.steps):
                    looks = step % LOOK_EVERY == 0 or self.device.type == "cpu"
                    if step == 0 or args.save_every and step % args.save_every == 0:
                        self.save(log)
                    if looks:
                        self.signals.check(self.device)
                    if step % args.eval_every == 0:
                        self.validate(log)
                    shown = step % args.print_every == 0
                    if shown or maml.measures_next or not self.replays:
                        seen = maml(sample(), every_step=shown)
                    else:
                        replayed = replayed or GraphedStep(maml, lambda: maml(sample()), sample.generator)
                        seen = replayed()
                    if looks or shown or seen.metrics:
                        self.look()
                        loss = seen.losses.mean()
                        bar.set_postfix(loss=f"{loss:.3f}", acc=f"{seen.accuracy[:, -1].mean():.3f}", refresh=False)
                    if shown:
                        skipped = {"skipped": self.skipped()} if args.skip_nonfinite else {}
                        log.add("train", step, loss=loss, acc=seen.accuracy.mean(0), **skipped)
                        say(f"step: {step} \ttraining acc: {percent(seen.accuracy.mean(0))}")
                    if seen.metrics:
                        log.metrics(step, "train", maml.net.blocks, seen.metrics)
                    bar.update()
                self.save(log)
                self.validate(log)
            except Interrupted:
                self.save(log)
                raise
        self.signals.check(self.device)

    def save(self, log: Log) -> None:
        """Write a checkpoint: the log first, for it must never be shorter than a checkpoint says."""
        self.look()
        checkpoint.save(self.out / "checkpoint.pt", self.maml, {
            "tasks": self.sampler.state, "best": self.best, "log_bytes": log.sync(), "minutes": self._minutes(),
            "of": self.of})

    def look(self) -> None:
        """Stop the run if an update was not made since the last look, because something in it was not finite."""
        if not self.args.skip_nonfinite and self.skipped():
            self._stop_at(int(self.maml.updates))
        self.looked = self.maml.step, self.sampler.state

    def skipped(self) -> int:
        """Updates that were not made; it waits for the device."""
        return self.maml.step - int(self.maml.updates)

    def _stop_at(self, step: int) -> None:
        """Draw that step's tasks again, keep them with the weights, which no later step has changed, and say why."""
        args, path = self.args, self.out / "nonfinite.pt"
        looked, self.sampler.state = self.looked
        for _ in range(step - looked):
            self.sampler()
        tasks = self.sampler()
        losses = self.maml.losses(tasks)
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        checkpoint.write(path, {"step": step, "weights": self.maml.net.state_dict(),
                                "adam": self.maml.optimizer.state_dict(), "tasks": tasks._asdict(), "losses": losses})
        what = f"the loss of task {', '.join(map(str, bad[:5]))}{', ...' * (len(bad) > 5)}" if bad else "the gradient"
        raise UserError(f"step {step}: {what} is not finite; its weights and tasks are in {path}. Lower --update_lr "
                        f"({args.update_lr}) or --meta_lr ({args.meta_lr}), clip the gradient with --clip, or leave "
                        f"such updates out with --skip_nonfinite: "
                        f"python {args.script}.py --from_args {self.out / 'args.json'} --clip 10")

    def validate(self, log: Log) -> None:
        """Validate, log, keep the weights if they are the best yet. Interrupted, it leaves everything as it was."""
        args, maml = self.args, self.maml
        self.look()
        with self.signals.raised():
            results = _evaluate(maml, self.splits, self.held_out, args.eval_tasks, VAL_SEED, self.signals,
                                measure=args.nc_every > 0)
        accuracy = torch.cat([accuracy for accuracy, _ in results])  # [tasks, steps + 1]
        mean, interval = _mean_and_interval(accuracy)
        log.add("val", maml.step, acc=mean, ci95=interval, tasks=len(accuracy))
        if args.nc_every > 0:
            log.metrics(maml.step, "heldout", maml.net.blocks, join([metrics for _, metrics in results]))
        say(f"step: {maml.step} \tvalidation acc: {percent(mean)} (last ± {100 * interval[-1]:.1f})")
        if self.best is None or mean[-1] > self.best["val_accuracy"]:
            weights = {name: weight.clone() for name, weight in maml.net.state_dict().items()}
            self.best = {"weights": weights, "step": maml.step, "val_accuracy": mean[-1].item()}
            checkpoint.write(self.out / "best.pt", self.best)

    def test(self) -> None:
        """Test the best weights; what is written last makes the run complete."""
        minutes = self._minutes()
        self.sampler = self.held_out = None  # room for the test images
        result = _test(self.args, self.maml, self.splits, self.out, self.signals)
        if self.args.skip_nonfinite:
            result["skipped_updates"] = self.skipped()
        memory = peak_memory(self.device)
        record.write_json(self.out / "timing.json", {
            "training_minutes": round(minutes, 2), "meta_steps": self.steps, "peak_memory_gb": memory})
        record.write_json(self.out / "result.json", result)
        say(f"{minutes:.1f} minutes for {self.steps} meta-steps, peak memory {memory} GB; results in {self.out}")

    def _minutes(self) -> float:
        return self.minutes + (time.perf_counter() - self.started) / 60


def _evaluate(maml: Meta, splits: Splits, images: Tensor, n_tasks: int, seed: int, signals: Signals,
              measure: bool = False) -> list:
    """`maml.finetune` of `n_tasks` tasks, always the same for a seed, a batch at a time."""
    sample = splits.sampler(images, seed, EVALUATION_BATCH)
    results = []
    for i, start in enumerate(range(0, n_tasks, EVALUATION_BATCH)):
        if i % devices.size() == 0:
            signals.check(splits.device)
        tasks = sample(min(EVALUATION_BATCH, n_tasks - start))
        if i % devices.size() == devices.rank():
            results.append(maml.finetune(tasks, measure))
    return devices.gather_lists(results)


def _test(args: argparse.Namespace, maml: Meta, splits: Splits, run: Path, signals: Signals) -> dict:
    """Test accuracy of a run's best weights on the test classes."""
    path = run / "best.pt"
    devices.wait()  # for the process that writes it
    try:
        best = checkpoint.read(path, splits.device, "train again")
        maml.net.load_state_dict(best["weights"])
        step, val_accuracy = int(best["step"]), float(best["val_accuracy"])
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the run hasn't got to its first validation") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path} doesn't hold this network's weights; train again") from error
    say(f"testing on {args.test_tasks} tasks of the test classes")
    results = _evaluate(maml, splits, splits.load("test"), args.test_tasks, TEST_SEED, signals)
    mean, interval = _mean_and_interval(torch.cat([accuracy for accuracy, _ in results]))
    k = args.update_step_test
    say(f"test accuracy on {splits.dataset.name}, {args.n_way}-way {args.k_spt}-shot, after {k} inner steps: "
        f"{100 * mean[-1]:.2f}% ± {100 * interval[-1]:.2f} (95%, {args.test_tasks} tasks, {args.k_qry} queries a "
        f"class, best weights of step {step})")
    say(f"after 0..{k} inner steps: {percent(mean)}")
    return {"data": splits.dataset.name, "test": {"accuracy": numbers(mean), "ci95": numbers(interval),
            "inner_steps": list(range(k + 1)), "tasks": args.test_tasks, "n_way": args.n_way, "k_spt": args.k_spt,
            "k_qry": args.k_qry}, "best_step": step, "val_accuracy": numbers(val_accuracy)}


def _test_again(args: argparse.Namespace, maml: Meta, splits: Splits, signals: Signals) -> None:
    run = Path(args.test)
    result = _test(args, maml, splits, run, signals)
    path = run / f"test-{args.test_tasks}tasks-{args.k_qry}qry-{args.update_step_test}steps.json"
    record.write_json(path, result)
    say(f"written to {path}")


def _banner(args: argparse.Namespace, net: Learner, dataset: Dataset, steps: int, out: Path) -> str:
    parameters = sum(weight.numel() for weight in net.parameters() if weight.requires_grad)
    settings = ", ".join(f"{name}={value}" for name, value in recorded_settings(args).items())
    return (f"{settings}\n{net}\nTotal trainable parameters: {parameters}\n"
            f"Data: {dataset.name}. {steps} meta-steps of {args.task_num} tasks on {args.device}, to {out}")


def _mean_and_interval(accuracy: Tensor) -> tuple[Tensor, Tensor]:
    """[tasks, steps] -> mean, and half of the 95% interval over tasks (normal)."""
    mean, se = nc_metrics.mean_and_se(accuracy.double().T)
    return mean, 1.96 * se
