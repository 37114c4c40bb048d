"""Fine-tune a causal language model on instruction records: the whole run, in reading order.

The loop is plain PyTorch: FSDP2 shards the model, every step's records and random numbers are a
pure function of the seed and the step's number, and the loss is the sum over target tokens divided
by their global count. So a step's result does not depend on how it was split over processes, and a
run that was cut goes on as if it had not been. The price: no callbacks and no plug-ins; to change
the loop, edit it.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from trainer.checkpoint import Checkpoints, Manifest, beginning
from trainer.config import Settings
from trainer.errors import ConfigError, Interrupted, StoppedError
from trainer.evaluation import mean_loss, own, read
from trainer.export import export
from trainer.failpoints import failpoint
from trainer.fsdp import local, make_mesh, replica_count
from trainer.metrics import Metrics, peak_memory_mib, say
from trainer.model import TokenLoss, load_tokenizer
from trainer.optim import learning_rate, make_optimizer, training_state
from trainer.output import claimed
from trainer.packing import Batches, MicroBatch
from trainer.prefetch import ahead
from trainer.prepare import (
    compute_type,
    datasets,
    laid_out,
    plans,
    print_arithmetic,
    print_mixture,
    recipe,
    resumed,
    sharded_model,
    step_count,
)
from trainer.ranks import Ranks, noticing_lost_ranks

__all__ = ["train"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def train(settings: Settings) -> None:
    """Train as ``settings`` say and write the finished model to ``output_dir``.

    Raises:
        TrainerError: one of its kinds; see trainer/errors.py.
    """
    # Before anything that takes long, so that Ctrl-C and a lost rank are noticed from here on.
    ranks = Ranks.start(settings.parallel)
    with noticing_lost_ranks(), _signals() as stop, claimed(settings.save, ranks):
        if ranks.rank == 0:
            for note in settings.notes:
                say(note)

        # 1. Records to tokens: once a host, mapped by its other processes.
        tokenizer = ranks.together(lambda: load_tokenizer(settings.model))
        training, held_out = datasets(settings, tokenizer, ranks)
        batches, evaluation = plans(settings, training, held_out, ranks)
        total_steps = step_count(settings.optim, batches)

        # 2. The model: read by rank 0, sharded over all.
        compute = compute_type(settings, ranks.device)
        replicas = ranks.together(lambda: replica_count(settings.parallel, ranks))
        mesh = make_mesh(replicas, ranks)
        model = sharded_model(settings, ranks, mesh, compute, training.dataset.largest_id)
        optimizer = make_optimizer(model, settings.optim)
        batches = laid_out(model, batches, ranks)
        if evaluation is not None:
            evaluation = replace(evaluation, packing=batches.packing)

        # 3. Where an earlier run was cut.
        checkpoints = Checkpoints(
            settings.save.output_dir,
            ranks,
            limit=settings.save.save_total_limit,
            beside=settings.save.async_save,
            say=say,
        )
        done = beginning(recipe(settings, model, batches, total_steps, compute))
        if settings.save.resume:
            done = resumed(settings, checkpoints, done, model, optimizer, ranks)
        # Rows stay cut as they were when the run began, whatever the number of processes now.
        processes = done.recipe["planned_processes"]
        batches = replace(batches, processes=processes)
        evaluation = evaluation and replace(evaluation, processes=processes)

        # 4. The loop.
        metrics = None
        if ranks.rank == 0:
            print_mixture(training, batches)
            print_arithmetic(settings, model, batches, total_steps, ranks, compute)
            metrics = _metrics(settings, done.step, total_steps)
        run = _Run(
            settings, ranks, model, replicas, optimizer, batches, evaluation, total_steps, metrics
        )
        if settings.log.eval_on_start and done.step == 0:
            run.evaluate(step=0)
        bad_in_a_row = 0
        for work in ahead(run.work, range(done.step, total_steps)):
            with _out_of_memory(done.step + 1):
                outcome = run.step(work, stop)
            bad_in_a_row = 0 if outcome.moved else bad_in_a_row + 1
            done = replace(
                done,
                step=done.step + 1,
                updates=done.updates + outcome.moved,
                tokens=done.tokens + outcome.tokens,
            )
            if bad_in_a_row > settings.optim.max_bad_steps:
                # A checkpoint that is being written is good, and its thread ends with the process.
                checkpoints.wait()
                ranks.fail(_not_finite(done, bad_in_a_row))
            if _due(settings.eval_strategy, settings.log.eval_steps, done.step, batches):
                run.evaluate(step=done.step)
            save = settings.save
            if outcome.signum or _due(save.save_strategy, save.save_steps, done.step, batches):
                checkpoints.save(training_state(model, optimizer), done)
            if outcome.signum:
                ranks.fail(checkpoints.wait() or _interrupted(outcome.signum, done))

        # 5. The finished model.
        if _last_evaluation_due(settings, done.step, batches):
            run.evaluate(step=done.step)
        # A checkpoint that could not be written does not cost the model that is finished.
        failed_save = checkpoints.wait()
        export(model, tokenizer, settings, ranks, alpaca=training.alpaca, compute=compute)
        if metrics is not None:
            metrics.close()
            say(f"finished: {settings.save.output_dir}")
        if failed_save is not None:
            raise failed_save
        ranks.stop()


@contextmanager
def _out_of_memory(step: int) -> Iterator[None]:
    """Raises ConfigError with the remedy where the GPU's memory does not hold a step."""
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise ConfigError(
            f"out of GPU memory in step {step}; lower --per_device_train_batch_size, or use"
            " --gradient_checkpointing or --fsdp 'full_shard offload'"
        ) from exc


def _metrics(settings: Settings, from_step: int, total_steps: int) -> Metrics:
    return Metrics(
        settings.save.output_dir / "metrics.jsonl",
        from_step=from_step,
        every=settings.log.logging_steps or min(10, math.ceil(total_steps / 10)),
        report_to=settings.log.report_to,
        run_name=settings.log.run_name,
        logging_dir=settings.log.logging_dir,
    )


@dataclass(frozen=True, slots=True)
class _Outcome:
    moved: bool
    """The optimizer moved; else loss or gradient was not finite."""
    tokens: int
    signum: signal.Signals | None
    """What some rank was sent."""


@dataclass(frozen=True, slots=True)
class _Work:
    """One step of one rank, as it was planned."""

    step: int
    """From 0."""
    targets: list[int]
    """Tokens that are learned, of each micro-batch of all ranks."""
    tokens: int
    """Of the global batch."""
    batches: list[tuple[int, MicroBatch]]
    """This rank's, with their numbers among all."""


@dataclass(frozen=True, slots=True)
class _Run:
    """One run's parts, and the two things that are done with them again and again."""

    settings: Settings
    ranks: Ranks
    model: TokenLoss
    replicas: int
    optimizer: torch.optim.Optimizer
    batches: Batches
    evaluation: Batches | None
    total_steps: int
    metrics: Metrics | None

    def work(self, step: int) -> _Work:
        """What there is to do in step ``step`` (from 0), for this rank."""
        groups = self.batches.micro_batches(step)
        return _Work(
            step,
            [self.batches.targets(group) for group in groups],
            int(self.batches.dataset.lengths[self.batches.records(step)].sum()),
            [
                (number, batch.pinned(self.ranks.device))
                for number, batch in own(groups, self.batches, self.ranks)
            ],
        )

    def step(self, work: _Work, stop: set[int]) -> _Outcome:
        """Forward, backward and optimizer for the global batch of a step."""
        started, cpu_started = time.perf_counter(), time.process_time()
        optim = self.settings.optim
        step, targets = work.step, work.targets
        losses, seen = [0.0] * len(targets), [0.0] * len(targets)
        summed: dict[int, Tensor] = {}  # on the device: reading one would wait for all before it
        for number, batch in work.batches:
            # Dropout follows from the micro-batch, not from the rank that happens to compute it.
            torch.manual_seed(_seed(optim.seed, step, number))
            loss_sum = self.model(batch.to(self.ranks.device))
            if number >= len(targets):  # nothing left for this rank, but FSDP needs it
                (loss_sum * 0.0).backward()
                continue
            share = (
                targets[number] * len(targets) if optim.loss_norm == "microbatch" else sum(targets)
            )
            # By the whole step's count, before backward: ranks then only add up their gradients.
            (loss_sum / share).backward()
            summed[number], seen[number] = loss_sum.detach(), float(batch.input_ids.numel())
        own_norm = self._squared_norm()
        for number, value in zip(summed, read(list(summed.values())), strict=True):
            losses[number] = value

        # One message for everything that all ranks must know.
        signals = [float(signum in stop) for signum in _SIGNALS]
        told = self.ranks.sum([*losses, *seen, own_norm, *signals])
        losses, told = told[: len(targets)], told[len(targets) :]
        squared_norm, *signals = told[len(targets) :]
        positions = sum(told[: len(targets)])
        loss = _mean(losses, targets, optim.loss_norm)
        if failpoint("train.loss"):
            loss = math.nan
        # To float32: the sum of squares differs in float64's last bits with the number of ranks.
        norm = float(np.float32(math.sqrt(squared_norm)))
        rate = learning_rate(optim, step, self.total_steps)
        # Of sums that all ranks have alike: so all of them move, or none.
        moved = math.isfinite(loss) and math.isfinite(norm)
        if moved:
            self._move(norm, rate)
        self.optimizer.zero_grad()
        failpoint("train.step")

        if self.metrics is not None:
            self.metrics.step(
                step=step + 1,
                loss=loss,
                grad_norm=norm,
                learning_rate=rate,
                tokens=work.tokens,
                targets=sum(targets),
                fill=work.tokens / positions,
                seconds=time.perf_counter() - started,
                cpu_seconds=time.process_time() - cpu_started,
                peak_memory_mib=peak_memory_mib(self.ranks.device),
            )
            if not moved:
                say(f"step {step + 1:>6}  loss or gradient is not finite: step skipped")
        sent = [signum for signum, count in zip(_SIGNALS, signals, strict=True) if count]
        return _Outcome(moved, work.tokens, sent[0] if sent else None)

    def _squared_norm(self) -> float:
        """This rank's share of the squared gradient norm, summed in float64."""
        gradients = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float64) if gradients else ()
        squares = [value * value for value in read(list(norms))]
        return sum(squares) / self.replicas  # each of which counts every shard

    def _move(self, norm: float, rate: float) -> None:
        limit = self.settings.optim.max_grad_norm
        scale = min(1.0, limit / (norm + 1e-6)) if limit else 1.0  # as clip_grad_norm_
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            if scale < 1.0:
                gradients = [local(p.grad) for p in group["params"] if p.grad is not None]
                torch._foreach_mul_(gradients, scale)
        self.optimizer.step()

    def evaluate(self, step: int) -> None:
        """The loss on the held-out records, a mean over their target tokens."""
        assert self.evaluation is not None
        loss, targets = mean_loss(self.model, self.evaluation, self.ranks)
        if self.metrics is not None:
            self.metrics.evaluation(step=step, loss=loss, targets=targets)


def _seed(seed: int, step: int, number: int) -> int:
    """Of the random numbers (dropout) of one micro-batch, wherever it is computed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {number}".encode()).digest()[:7])


def _mean(losses: list[float], targets: list[int], norm: str) -> float:
    """The step's loss from its micro-batches' sums; fsum, so that their order does not matter."""
    if norm == "microbatch":
        return math.fsum(loss / n for loss, n in zip(losses, targets, strict=True)) / len(losses)
    return math.fsum(losses) / sum(targets)


@contextmanager
def _signals() -> Iterator[set[int]]:
    """A set that receives SIGINT and SIGTERM instead of their usual effect; a second one has it."""
    received: set[int] = set()

    def receive(signum: int, frame: FrameType | None) -> None:
        received.add(signum)
        # A step may take minutes, and a person may not want to wait for its end.
        signal.signal(signum, signal.default_int_handler if signum == 2 else signal.SIG_DFL)

    before = {signum: signal.signal(signum, receive) for signum in _SIGNALS}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _due(strategy: str, every: int, step: int, batches: Batches) -> bool:
    """Whether something happens after ``step`` steps."""
    return (strategy == "steps" and step % every == 0) or (
        strategy == "epoch" and step % batches.steps_per_epoch == 0
    )


def _last_evaluation_due(settings: Settings, step: int, batches: Batches) -> bool:
    """Whether the finished model was not evaluated by the strategy already."""
    strategy = settings.eval_strategy
    return strategy != "no" and not _due(strategy, settings.log.eval_steps, step, batches)


def _not_finite(done: Manifest, bad: int) -> StoppedError:
    return StoppedError(
        f"loss or gradient was not finite in {bad} steps in a row; the last good step is"
        f" {done.step - bad}; look at the records of steps {done.step - bad + 1} to {done.step},"
        " or start again with a lower --learning_rate"
    )


def _interrupted(signum: signal.Signals, done: Manifest) -> Interrupted:
    return Interrupted(
        signum,
        f"{signum.name}: stopped after step {done.step}, in checkpoint-{done.step}; go on with"
        " --resume",
    )
