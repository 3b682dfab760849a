"""The training loop: one run from its config to its result. worker.py runs it in a process of its own."""

import itertools
import math
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import xattn
from xattn.experiments import checkpoint, record
from xattn.experiments.configfile import redact
from xattn.experiments.data import Batch, Corpus, Seen, check_corpus, eval_blocks, train_batch
from xattn.experiments.device import autocast, pick_device, pick_precision, synchronise
from xattn.experiments.judge import judge_all, score, token_nll
from xattn.experiments.optim import build_optimiser, lr_factor
from xattn.experiments.record import say
from xattn.experiments.schema import RunConfig
from xattn.experiments.sources import load_corpus
from xattn.experiments.tracking import WandbMirror

_SECONDS_BETWEEN_LINES = 10.0
# The first steps pay for allocation and warm-up; they count as training time but not towards tokens a second.
_WARMUP_STEPS = 3


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


class Diverged(Exception):
    """The loss is not a finite number."""


class Trainer:
    """One run from config to result. The order of `run` is the order of the story."""

    def __init__(self, config: RunConfig, run_dir: Path, *, quiet: bool, stop: dict[str, Any]) -> None:
        self.config, self.run_dir, self.quiet, self.stop = config, run_dir, quiet, stop
        self.device = pick_device(config.trainer)
        self.precision = pick_precision(config.trainer, self.device)
        if config.trainer.threads is not None:
            torch.set_num_threads(config.trainer.threads)

    def run(self) -> dict[str, Any]:
        config = self.config
        self.corpus = self._corpus()
        self._build()
        self._announce()
        self.metrics = record.MetricsFile(self.run_dir, keep_until_step=self.progress.step)
        described = redact(asdict(config)) | self._facts()
        self.mirror = WandbMirror(self.run_dir, config.tracking, name=config.name, job_type="train", config=described)
        finished = False
        try:
            self._train()
            result = self._result()
            record.write_json(self.run_dir / record.RESULT, result)
            self.mirror.summary(_summary(result))
            checkpoint.remove_checkpoints(self.run_dir)
            finished = True
            return result
        finally:
            self.metrics.close()
            self.mirror.finish(failed=not finished)

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

    def _build(self) -> None:
        newest = checkpoint.newest_checkpoint(self.run_dir)
        if newest is None:
            # Seeded here and nowhere before, so that variants with the same parameters start from the same weights.
            torch.manual_seed(self.config.seed)
            self.model = xattn.build(self.config.model).to(self.device)
            self.optimiser = build_optimiser(self.model, self.config.optim)
            self.progress = checkpoint.Progress()
        else:
            self.model, state, self.progress = checkpoint.load_checkpoint(
                newest, attn_backend=self.config.model.get("attn_backend", "auto")
            )
            self.model.to(self.device)
            self.optimiser = build_optimiser(self.model, self.config.optim)
            self.optimiser.load_state_dict(state)
            say(f"resuming from step {self.progress.step}")
        self.ar = xattn.AutoregressiveWrapper(self.model)
        self.params = sum(p.numel() for p in self.model.parameters())

    def _announce(self) -> None:
        (self.run_dir / "explain.txt").write_text(self.model.explain() + "\n", encoding="utf-8")
        if not self.quiet:
            say(self.model.explain())
        trainer = self.config.trainer
        say(
            f"{self.params:,} parameters, {trainer.tokens:,} tokens of {self.corpus.name} in {trainer.steps} steps, "
            f"{self.device} {self.precision}, back-end {backend_summary(self.model.backends())}"
        )

    def _facts(self) -> dict[str, Any]:
        return {"params": self.params, "device": str(self.device), "backends": backend_summary(self.model.backends())}

    # Training.

    def _train(self) -> None:
        trainer = self.config.trainer
        self.seen = Seen(self.progress.seen)
        self.step_seconds: list[float] = []
        self._last_line = 0.0
        self.model.train()
        for step in range(self.progress.step, trainer.steps):
            began = time.perf_counter()
            loss, grad_norm, lr = self._step(step)
            synchronise(self.device)
            self.step_seconds.append(time.perf_counter() - began)
            self.progress = checkpoint.Progress(
                step=step + 1, seen=self.seen.digest, seconds=self.progress.seconds + self.step_seconds[-1]
            )
            self._report(loss, grad_norm, lr)
            self._maybe_save(loss)

    def _step(self, step: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """One optimiser step. Returns the mean loss in nats a token, the gradient norm before clipping, the rate."""
        config, trainer = self.config, self.config.trainer
        batch = train_batch(self.corpus, seed=config.seed, step=step, batch_size=trainer.batch_size, seq_len=trainer.seq_len)
        self.seen.update(batch)
        lr = config.optim.lr * lr_factor(step * trainer.tokens_per_step, total=trainer.tokens, schedule=config.schedule)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        # Dropout is a function of (seed, step) too, so that a resumed run draws the same masks.
        torch.manual_seed((config.seed << 32) + step)
        total = torch.zeros((), device=self.device)
        for micro in batch.split(trainer.micro_batch or trainer.batch_size):
            loss = self._loss(micro.to(self.device))
            share = len(micro) / len(batch)
            (loss * share).backward()
            total += loss.detach().float() * share
        limit = config.optim.grad_clip if config.optim.grad_clip is not None else math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return total, grad_norm, lr

    def _loss(self, batch: Batch) -> torch.Tensor:
        with autocast(self.device, self.precision):
            return self.ar(batch.ids_bn, doc_ids=batch.doc_ids_bn)

    def _report(self, loss: torch.Tensor, grad_norm: torch.Tensor, lr: float) -> None:
        trainer, step = self.config.trainer, self.progress.step
        last = step == trainer.steps
        row: dict[str, Any] = {"step": step, "tokens": step * trainer.tokens_per_step}
        if step % trainer.log_every == 0 or last or step == 1:
            value = float(loss)
            _check_finite(value, step)
            row |= {"train/loss": value, "train/grad_norm": float(grad_norm), "train/lr": lr}
            row["perf/tokens_per_second"] = self._tokens_per_second()
        every = self.config.eval.every
        if every is not None and step % every == 0 and not last:
            row |= self._quick_eval()
        if len(row) > 2:
            self.metrics.write(row)
            self.mirror.log(row)
            self._line(row, last=last)

    def _quick_eval(self) -> dict[str, float]:
        seq_len = self.config.trainer.seq_len
        blocks = eval_blocks(self.corpus, tokens=self.config.eval.every_tokens, length=seq_len, longest=seq_len)
        nll_bn = token_nll(
            self.model,
            blocks,
            batch_tokens=self.config.eval.batch_tokens,
            device=self.device,
            precision=self.precision,
        )
        values = score(nll_bn, blocks.ids_bn[:, 1:], self.corpus)
        return {f"val/{name}": values[name] for name in ("loss_nats", "ppl", "bpb") if values[name] is not None}

    def _line(self, row: dict[str, Any], *, last: bool) -> None:
        now = time.perf_counter()
        if not last and now - self._last_line < _SECONDS_BETWEEN_LINES and "val/bpb" not in row:
            return
        self._last_line = now
        steps = self.config.trainer.steps
        left = (steps - self.progress.step) * statistics.median(self.step_seconds)
        text = f"step {self.progress.step}/{steps}"
        if "train/loss" in row:
            text += f"  loss {row['train/loss']:.3f}"
        if row.get("val/bpb") is not None and "val/bpb" in row:
            text += f"  val bpb {row['val/bpb']:.3f}"
        say(f"{text}  {self._tokens_per_second():,.0f} tokens/s  {left:.0f} s left")

    def _tokens_per_second(self) -> float:
        """Tokens of a step over the median step time, warm-up left out: steady although other programs come and go."""
        settled = self.step_seconds[_WARMUP_STEPS:] or self.step_seconds
        if not settled:
            return self.progress.tokens_per_second
        return self.config.trainer.tokens_per_step / statistics.median(settled)

    def _maybe_save(self, loss: torch.Tensor) -> None:
        trainer, step = self.config.trainer, self.progress.step
        due = trainer.save_every is not None and step % trainer.save_every == 0
        # The last step always: judging may be stopped too, and must not take the training with it.
        if due or self.stop["signal"] or step == trainer.steps:
            # Looked at here too: weights that have diverged must not push out the last good checkpoint.
            _check_finite(float(loss), step)
            self.progress.tokens_per_second = self._tokens_per_second()
            checkpoint.save_checkpoint(self.run_dir, self.model, self.optimiser, self.progress, keep=trainer.keep_checkpoints)
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.stop["signal"]:
            self.mirror.preempting()
            raise Interrupted(
                f"{self.stop['signal']} after step {self.progress.step}; its state is saved: start it again to go on"
            )

    # The end.

    def _result(self) -> dict[str, Any]:
        config, trainer = self.config, self.config.trainer
        say("judging")
        judged = judge_all(
            self.model,
            self.corpus,
            config.eval,
            seq_len=trainer.seq_len,
            device=self.device,
            precision=self.precision,
            before_each=self._stop_if_asked,
        )
        row = {"step": self.progress.step, "tokens": trainer.tokens}
        row |= {f"val/{name}": judged["val"].get(name) for name in ("loss_nats", "ppl", "bpb")}
        self.metrics.write(row)
        self.mirror.log({name: value for name, value in row.items() if value is not None})
        _save_model(self.model, self.run_dir / "model")
        spec = self.model.spec
        memory = record.read_json(self.run_dir / record.MEMORY) or {"error": "not measured"}
        memory["kv_bytes_per_token"] = xattn.accounting.kv_bytes(spec, trainer.seq_len) / trainer.seq_len
        return {
            "status": record.COMPLETED,
            "name": config.name,
            "seed": config.seed,
            "flags": {"given": config.model, "resolved": xattn.to_flags(spec)},
            "backends": self.model.backends(),
            "params": self.params,
            "tokens": trainer.tokens,
            **judged,
            "memory": memory,
            "tokens_per_second": self._tokens_per_second(),
            "train_seconds": self.progress.seconds,
            "train_flops": xattn.accounting.train_flops(spec, trainer.seq_len) * trainer.steps * trainer.batch_size,
            "device": str(self.device),
            "precision": self.precision,
            "data": {
                "corpus": self.corpus.name,
                "tokenizer": self.corpus.tokenizer,
                "tokens_seen_digest": self.seen.digest,
            },
            **record.provenance(),
        }


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"the loss is {loss} at step {step}; use a smaller optim.lr or a longer warm-up")


def backend_summary(backends: list[dict[str, Any]]) -> str:
    """`sdpa`, or, where layers differ, `sdpa 0-2, reference 3`: which back-end each layer runs on."""
    names = [str(row["backend"]) for row in backends]
    if len(set(names)) == 1:
        return names[0]
    parts, first = [], 0
    for name, group in itertools.groupby(names):
        last = first + len(list(group)) - 1
        parts.append(f"{name} {first}" if first == last else f"{name} {first}-{last}")
        first = last + 1
    return ", ".join(parts)


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    flat = {f"final/{name}": value for name, value in result["val"].items()}
    flat |= {f"mem/{name}": value for name, value in result["memory"].items() if isinstance(value, int | float)}
    return flat | {"perf/tokens_per_second_median": result["tokens_per_second"], "params": result["params"]}


def _save_model(model: Any, path: Path) -> None:
    import os
    import shutil

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    xattn.save(model, temporary)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
