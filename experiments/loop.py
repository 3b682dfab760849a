"""The training loop: one run from its config to trained weights, which outcome.py judges. Long, since its steps share so much."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from xattn.experiments import checkpoint, record
from xattn.experiments.configfile import redact
from xattn.experiments.data import Batch, Corpus, Seen, check_corpus, eval_blocks, train_batch
from xattn.experiments.device import autocast, pick_device, pick_precision, synchronise
from xattn.experiments.distributed import join
from xattn.experiments.ema import ema_state
from xattn.experiments.judge import judge
from xattn.experiments.optim import lr_factor
from xattn.experiments.outcome import Trained, backend_summary, conclude, own_memory, summary, val_row
from xattn.experiments.pace import Pace
from xattn.experiments.progress import Display
from xattn.experiments.record import say
from xattn.experiments.samples import keep_samples, write_samples
from xattn.experiments.schema import RunConfig
from xattn.experiments.sources import load_corpus
from xattn.experiments.start import start
from xattn.experiments.tracking import Mirror
from xattn.experiments.watch import Watch


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class Diverged(Exception):
    """The loss is not a finite number."""


class Trainer:
    """One run from its config to its end. The order of `run` is the order of the story."""

    def __init__(self, config: RunConfig, run_dir: Path, *, quiet: bool, stop: dict[str, Any]) -> None:
        self.config, self.run_dir, self.quiet, self.stop = config, run_dir, quiet, stop
        self.device = pick_device(config.trainer)
        self.precision = pick_precision(config.trainer, self.device)
        if config.trainer.threads is not None:
            torch.set_num_threads(config.trainer.threads)

    def run(self) -> dict[str, Any] | None:
        """Train, judge and record. Returns the result; None on all ranks but the first, which alone judges."""
        self.ranks = join(self.config.trainer, self.device)
        try:
            self.corpus = self._corpus()
            self._start()
            if not self.ranks.first:
                return self._follow()
            self._announce()
            return self._lead()
        finally:
            self.ranks.leave()

    def _lead(self) -> dict[str, Any]:
        config = self.config
        self.metrics = record.MetricsFile(self.run_dir, keep_until_step=self.progress.step)
        described = redact(asdict(config)) | self._facts()
        self.mirror = Mirror(self.run_dir, config.tracking, name=config.name, job_type="train", config=described)
        self.display = Display()
        finished = False
        try:
            self._train()
            self._gather()
            say("judging")
            result = conclude(self._trained(), tell=self._tell, keep=self._keep_samples, before_each=self._stop_if_asked)
            record.write_json(self.run_dir / record.RESULT, result)
            self.mirror.summary(summary(result))
            checkpoint.remove_checkpoints(self.run_dir)
            finished = True
            return result
        finally:
            self.display.close()
            self.metrics.close()
            self.mirror.finish(failed=not finished)

    def _follow(self) -> None:
        """A rank that is not the first takes every step with it, and says and writes nothing."""
        self.metrics = self.mirror = None
        self.display = Display(silent=True)
        self._train()
        self._gather()

    def _corpus(self) -> Corpus:
        config = self.config
        corpus = load_corpus(config.data)
        check_corpus(
            corpus,
            num_tokens=config.model["num_tokens"],
            trainer=config.trainer,
            longest=max(config.eval.length_factors) * config.trainer.seq_len,
        )
        return corpus

    def _start(self) -> None:
        began = start(self.config, self.run_dir, device=self.device, ranks=self.ranks)
        self.model, self.ema, self.loss, self.optimiser = began.model, began.ema, began.loss, began.optimiser
        self.params, self.progress = began.params, began.progress
        if self.progress.step:
            self._say(f"resuming from step {self.progress.step}")
        self.watch = Watch(**self.progress.watch)
        self.pace = Pace(
            trainer=self.config.trainer,
            spec=self.model.spec,
            device=self.device,
            precision=self.precision,
            before=self.progress.tokens_per_second,
        )

    def _say(self, text: str) -> None:
        if self.ranks.first:
            say(text)

    def _announce(self) -> None:
        (self.run_dir / "explain.txt").write_text(self.model.explain() + "\n", encoding="utf-8")
        if not self.quiet:
            say(self.model.explain())
        trainer = self.config.trainer
        ranks = f", {trainer.processes} processes {trainer.strategy}" if trainer.strategy != "none" else ""
        say(
            f"{self.params:,} parameters, {trainer.tokens:,} tokens of {self.corpus.name} in {trainer.steps} steps, "
            f"{self.device} {self.precision}{ranks}, back-end {backend_summary(self.model.backends())}"
        )

    def _facts(self) -> dict[str, Any]:
        return {"params": self.params, "device": str(self.device), "backends": backend_summary(self.model.backends())}

    # Training.

    def _train(self) -> None:
        trainer = self.config.trainer
        self.seen = Seen(self.progress.seen)
        self.model.train()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for step in range(self.progress.step, trainer.steps):
            began = time.perf_counter()
            loss, grad_norm, lr = self._step(step)
            synchronise(self.device)
            self.pace.seconds.append(time.perf_counter() - began)
            loss, grad_norm = self.ranks.mean(float(loss)), float(grad_norm)
            _check_finite(loss, grad_norm, step + 1)
            spiked = self.watch.see(
                loss, grad_norm, step=step + 1, deviations=trainer.spike_deviations, grad_clip=self.config.optim.grad_clip
            )
            if spiked:
                self._say(spiked)
            self.progress = checkpoint.Progress(
                step=step + 1,
                seen=self.seen.digest,
                seconds=self.progress.seconds + self.pace.seconds[-1],
                watch=self.watch.state(),
            )
            self._report(loss, grad_norm, lr)
            self._maybe_save()

    def _step(self, step: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """One optimiser step. Returns this rank's mean loss in nats a token, the gradient norm before clipping, the rate."""
        config, trainer = self.config, self.config.trainer
        batch = train_batch(self.corpus, seed=config.seed, step=step, batch_size=trainer.batch_size, seq_len=trainer.seq_len)
        self.seen.update(batch)
        lr = config.optim.lr * lr_factor(step * trainer.tokens_per_step, total=trainer.tokens, schedule=config.schedule)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        # Dropout is a function of (seed, step) too, so that a resumed run draws the same masks; ranks draw their own.
        torch.manual_seed((config.seed << 32) + (self.ranks.rank << 24) + step)
        total = torch.zeros((), device=self.device)
        share = trainer.forward_rows / trainer.rows
        micros = list(self.ranks.share(batch).split(trainer.forward_rows))
        for number, micro in enumerate(micros, start=1):
            with self.ranks.accumulating(self.model, self.loss, last=number == len(micros)):
                loss = self._loss(micro.to(self.device))
                (loss * share).backward()
            total += loss.detach().float() * share
        limit = config.optim.grad_clip if config.optim.grad_clip is not None else math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return total, getattr(grad_norm, "full_tensor", lambda: grad_norm)(), lr

    def _loss(self, batch: Batch) -> torch.Tensor:
        with autocast(self.device, self.precision):
            return self.loss(batch.ids_bn, doc_ids=batch.doc_ids_bn, target_mask=batch.counts_bn)

    def _report(self, loss: float, grad_norm: float, lr: float) -> None:
        trainer, step = self.config.trainer, self.progress.step
        last = step == trainer.steps
        row: dict[str, Any] = {"step": step, "tokens": step * trainer.tokens_per_step}
        if step % trainer.log_every == 0 or last or step == 1:
            row |= {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": lr}
            row["perf/tokens_per_second"] = self.pace.tokens_per_second()
            mfu = self.pace.mfu()
            row |= {} if mfu is None else {"perf/mfu": mfu}
        every = self.config.eval.every
        samples: list[dict[str, str]] = []
        if every is not None and step % every == 0 and not last:
            # All ranks together: with shards, no rank has a whole model.
            row |= self._quick_eval()
            samples = self._samples()
            self.ranks.settle(self.model, self._judged())
        if not self.ranks.first:
            return
        if len(row) > 2:
            self._tell(row)
        self._keep_samples(samples)
        self._line(loss, row, last=last)

    def _tell(self, row: dict[str, Any]) -> None:
        self.metrics.write(row)
        self.mirror.log({name: value for name, value in row.items() if value is not None})

    def _judged(self) -> Any:
        """The weights that count: the average where there is one, else the model."""
        return self.model if self.ema is None else self.ema.module

    def _samples(self) -> list[dict[str, str]]:
        return write_samples(self._judged(), self.corpus, self.config, device=self.device, precision=self.precision)

    def _keep_samples(self, samples: list[dict[str, str]]) -> None:
        if samples:
            step = self.progress.step
            self.metrics.write({"step": step, "tokens": step * self.config.trainer.tokens_per_step, "samples": samples})
            keep_samples(self.run_dir)

    def _quick_eval(self) -> dict[str, float]:
        seq_len, config = self.config.trainer.seq_len, self.config.eval
        blocks = eval_blocks(self.corpus, tokens=config.every_tokens, length=seq_len, longest=seq_len)

        def values(model: Any, prefix: str) -> dict[str, float]:
            scored = judge(model, blocks, self.corpus, config, device=self.device, precision=self.precision)
            return {name: value for name, value in val_row(scored, prefix).items() if value is not None}

        raw = values(self.model, "val/raw_") if self.ema is not None else {}
        return values(self._judged(), "val/") | raw

    def _line(self, loss: float, row: dict[str, Any], *, last: bool) -> None:
        steps = self.config.trainer.steps
        left = self.pace.left(steps - self.progress.step)
        text = f"loss {loss:.3f}"
        if row.get("val/bpb") is not None:
            text += f"  val bpb {row['val/bpb']:.3f}"
        if "val/accuracy" in row:
            text += f"  accuracy {row['val/accuracy']:.3f}"
        text += f"  {self.pace.tokens_per_second():,.0f} tokens/s  {left:.0f} s left"
        self.display.step(self.progress.step, steps, text, important=last or "val/loss_nats" in row)

    def _maybe_save(self) -> None:
        trainer, step = self.config.trainer, self.progress.step
        due = trainer.save_every is not None and step % trainer.save_every == 0
        # A stop asked of one rank is everybody's.
        asked = not self.ranks.agree(not self.stop["signal"])
        # The last step always: judging may be stopped too, and must not take the training with it.
        if due or asked or step == trainer.steps:
            # Weights that have diverged must not push out the last good checkpoint.
            if not self.ranks.agree(all(bool(_local(p).isfinite().all()) for p in self.model.parameters())):
                raise Diverged(f"the weights are not finite after step {step}; {_CURE}")
            self.progress.tokens_per_second = self.pace.tokens_per_second()
            checkpoint.save_checkpoint(
                self.run_dir,
                self.model,
                self.optimiser,
                self.progress,
                keep=trainer.keep_checkpoints,
                ema=ema_state(self.ema),
                ranks=self.ranks,
            )
        if asked:
            self._stop()

    def _stop_if_asked(self) -> None:
        if self.stop["signal"]:
            self._stop()

    def _stop(self) -> None:
        if self.mirror is not None:
            self.mirror.preempting()
        raise Interrupted(
            f"{self.stop['signal'] or 'a stop request'} after step {self.progress.step}; its state is saved: "
            "start it again to go on"
        )

    # The end.

    def _gather(self) -> None:
        """Put shards together and let the other ranks go: judging needs one process."""
        # A run resumed after its last step trained nothing in this process.
        self.own_memory = own_memory(self.device) if self.pace.seconds else {}
        self.model = self.ranks.whole(self.model)
        if self.ema is not None:
            self.ema.module = self.ranks.whole(self.ema.module)
        self.ranks.leave()
        self.display.close()

    def _trained(self) -> Trained:
        return Trained(
            config=self.config,
            run_dir=self.run_dir,
            model=self.model,
            average=None if self.ema is None else self.ema.module,
            corpus=self.corpus,
            device=self.device,
            precision=self.precision,
            seen=self.seen.digest,
            memory=self.own_memory,
            facts={
                "params": self.params,
                **self.watch.result(),
                "tokens_per_second": self.pace.tokens_per_second(),
                "train_seconds": self.progress.seconds,
                "mfu": self.pace.mfu(),
            },
        )


_CURE = "use a smaller optim.lr or a longer warm-up"


def _check_finite(loss: float, grad_norm: float, step: int) -> None:
    for what, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise Diverged(f"the {what} is {value} at step {step}; {_CURE}")


def _local(p: torch.Tensor) -> torch.Tensor:
    return p.to_local() if hasattr(p, "to_local") else p
