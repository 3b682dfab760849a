"""What an experiment is: the typed fields of every config group, their units, and the laws between them.

The `model` group is the library's own flat flag dict, so its names and defaults are written in xattn and nowhere here.
`None` always means not given; the comment beside a field says what is then used.
"""

import importlib.util
from dataclasses import dataclass, field, replace
from typing import Any

from xattn import ConfigError

SOURCES = ("shakespeare", "text", "bin", "hf", "passkey", "task")
TOKENIZERS = ("bytes", "bpe", "gpt2")
OPTIMISERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd", "linear", "constant")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
CHECKPOINTING = ("none", "full")
STRATEGIES = ("none", "ddp", "fsdp")
PROBES = ("train", "infer")
TRACKING_MODES = ("auto", "online", "offline", "disabled")


# Fields of DataConfig that only some sources read.
_READ_BY = {
    "val_path": ("text",),
    "tokenizer": ("shakespeare", "hf", "text"),
    "val_fraction": ("shakespeare", "hf", "text"),
    "document_mask": ("shakespeare", "hf", "text"),
    "text_field": ("hf", "text"),
    "hf_config": ("hf",),
    "passage_tokens": ("passkey",),
    "max_train_tokens": ("shakespeare", "text", "bin", "hf", "passkey"),
}
# Sizes of TaskConfig and the tasks that have them.
TASKS = ("mqar", "variable_assignment", "copy", "parity")
_SIZES = {"pairs": TASKS[:2], "vocabulary": TASKS[:3], "bits": ("parity",)}


@dataclass(kw_only=True)
class TaskConfig:
    """A task with answers, of data.source=task; see experiments/tasks.py."""

    name: str = "mqar"
    pairs: int | None = None  # keys with a value, variables; None: one in 8 tokens of trainer.seq_len, in 16 where assigned
    vocabulary: int | None = None  # ids: half of them keys or variables, half values; copy: any. None: 256, copy 64
    bits: int | None = None  # between two parities; None: 1

    def check(self) -> None:
        _choice("data.task.name", self.name, TASKS)
        for size, tasks in _SIZES.items():
            value = getattr(self, size)
            if value is not None and self.name not in tasks:
                raise ConfigError(
                    f"data.task.{size}={value} has no effect: data.task.name is {self.name}; drop it, or use "
                    f"data.task.name={' or '.join(tasks)}"
                )
            if value is not None:
                _positive(f"data.task.{size}", value)

    def settled(self, seq_len: int = 64) -> "TaskConfig":
        """The same task with every size that it has, for this trained length."""
        sizes = {"pairs": max(seq_len // (8 if self.name == "mqar" else 16), 1), "bits": 1}
        sizes["vocabulary"] = 64 if self.name == "copy" else 256
        own = {size: sizes[size] for size, tasks in _SIZES.items() if self.name in tasks and getattr(self, size) is None}
        return replace(self, **own)

    def check_room(self, length: int, pairs: int | None) -> None:
        """Raise ConfigError where a settled task with this many pairs has no room in sequences of `length` tokens."""
        needed = 4 * pairs if pairs is not None else self.bits or 2
        if length < needed:
            what, cure = f"data.task.name={self.name}", ""
            if pairs is not None:
                what, cure = f"data.task.pairs={pairs}", f"data.task.pairs={max(length // 4, 1)} or fewer, or "
            elif self.bits is not None:
                what, cure = f"data.task.bits={self.bits}", "data.task.bits=1, or "
            raise ConfigError(f"{what} needs {needed} tokens, and a sequence has {length}; use {cure}a longer trainer.seq_len")

    def check_names(self, pairs: int) -> None:
        """Raise ConfigError where the vocabulary has not as many names."""
        if self.vocabulary < 2 * pairs:
            raise ConfigError(
                f"data.task.vocabulary={self.vocabulary} has {self.vocabulary // 2} names for {pairs} pairs; "
                f"use data.task.vocabulary={2 * pairs} or more"
            )


@dataclass(kw_only=True)
class DataConfig:
    """Where tokens come from. `val_fraction` splits off the end of a source that has no validation part of its own."""

    source: str = "shakespeare"
    path: str | None = None  # text: file or glob of the training part; bin: folder with train.bin; hf: data set name
    val_path: str | None = None
    tokenizer: str = "bytes"
    vocab_size: int = 8192  # bpe only
    val_fraction: float = 0.1
    cache: str | None = None  # folder for tokenised text; None: ~/.cache/xattn
    text_field: str = "text"  # of a .jsonl line or a Hugging Face row
    document_mask: bool = True  # attention and positions stop at document ends
    hf_config: str | None = None
    max_train_tokens: int | None = None  # passkey: how many are made; None: 2,000,000
    passage_tokens: int = 256  # passkey only: tokens of one passage, within which keys are asked for
    task: TaskConfig = field(default_factory=TaskConfig)  # task only

    def check(self) -> None:
        _choice("data.source", self.source, SOURCES)
        _choice("data.tokenizer", self.tokenizer, TOKENIZERS)
        if not 0.0 < self.val_fraction < 1.0:
            raise ConfigError(f"data.val_fraction={self.val_fraction} is not between 0 and 1; use 0.1")
        _positive("data.vocab_size", self.vocab_size)
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            raise ConfigError(f"data.vocab_size={self.vocab_size} is too small for a BPE: 256 bytes and a separator; use 8192")
        if self.max_train_tokens is not None:
            _positive("data.max_train_tokens", self.max_train_tokens)
        _positive("data.passage_tokens", self.passage_tokens)
        without_path = self.source in ("shakespeare", "passkey", "task")
        if not without_path and self.path is None:
            raise ConfigError(f"data.source={self.source} reads data.path, which is not given; use data.path=...")
        if without_path and self.path is not None:
            raise ConfigError(f"data.path={self.path} has no effect: data.source is {self.source}; use data.source=text")
        for name, sources in _READ_BY.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != default and self.source not in sources:
                raise ConfigError(
                    f"data.{name}={value} has no effect: data.source is {self.source}; drop it, or use data.source={sources[-1]}"
                )
        self.task.check()
        if self.source != "task" and self.task != TaskConfig():
            raise ConfigError(
                f"data.task.name={self.task.name} has no effect: data.source is {self.source}; use data={self.task.name}"
            )
        if self.val_fraction != 0.1 and self.val_path is not None:
            raise ConfigError(f"data.val_fraction={self.val_fraction} has no effect: data.val_path is given; drop one of them")
        if self.vocab_size != 8192 and self.tokenizer != "bpe":
            raise ConfigError(f"data.vocab_size={self.vocab_size} has no effect: data.tokenizer is {self.tokenizer}; use bpe")


@dataclass(kw_only=True)
class OptimConfig:
    """Learning rates are a step; weight decay is decoupled and spares vectors (norms, biases).

    `muon` serves the matrices inside the blocks; AdamW with the same rate serves embeddings, head and vectors beside it.
    """

    name: str = "adamw"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float | None = None  # muon only; None: 0.95
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0  # largest gradient norm; None: no clipping

    def check(self) -> None:
        _choice("optim.name", self.name, OPTIMISERS)
        _positive("optim.lr", self.lr)
        _positive("optim.eps", self.eps)
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ConfigError(f"optim.{name}={value} is not in [0, 1); use 0.9")
        if self.momentum is not None and self.name != "muon":
            raise ConfigError(f"optim.momentum={self.momentum} has no effect: optim.name is {self.name}; use optim.beta1")
        if self.weight_decay < 0:
            raise ConfigError(f"optim.weight_decay={self.weight_decay} is negative; use 0 for none")
        if self.grad_clip is not None:
            _positive("optim.grad_clip", self.grad_clip)


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate against tokens seen, as a factor of optim.lr."""

    name: str = "cosine"
    warmup_tokens: int | None = None  # None: 5 % of the run
    decay_fraction: float | None = None  # wsd only: the last part of the run; None: 0.2
    final_factor: float | None = None  # where the decay ends; None: 0.1

    def check(self) -> None:
        _choice("schedule.name", self.name, SCHEDULES)
        if self.warmup_tokens is not None and self.warmup_tokens < 0:
            raise ConfigError(f"schedule.warmup_tokens={self.warmup_tokens} is negative; use 0 for no warm-up")
        if self.decay_fraction is not None:
            if self.name != "wsd":
                raise ConfigError(
                    f"schedule.decay_fraction={self.decay_fraction} has no effect: schedule.name is {self.name}; use schedule=wsd"
                )
            if not 0.0 < self.decay_fraction <= 1.0:
                raise ConfigError(f"schedule.decay_fraction={self.decay_fraction} is not in (0, 1]; use 0.2")
        if self.final_factor is not None:
            if self.name == "constant":
                raise ConfigError(
                    f"schedule.final_factor={self.final_factor} has no effect: schedule.name is constant; use schedule=cosine"
                )
            if not 0.0 <= self.final_factor <= 1.0:
                raise ConfigError(f"schedule.final_factor={self.final_factor} is not in [0, 1]; use 0.1")


@dataclass(kw_only=True)
class TrainerConfig:
    """One step reads batch_size sequences of seq_len tokens, shared out among `processes`, micro_batch of them at a time."""

    steps: int = 500
    seq_len: int = 256
    batch_size: int = 16
    micro_batch: int | None = None  # sequences of one process's forward; None: its whole share, no accumulation
    device: str = "auto"
    precision: str = "auto"  # auto: bf16 autocast on CUDA, fp32 on the CPU
    threads: int | None = None  # CPU threads; None: torch's own choice
    compile: bool = False  # torch.compile of the loss; evaluation stays eager
    activation_checkpointing: str = "none"  # full: keep only the blocks' inputs and compute the rest again
    ema_decay: float | None = None  # averages the weights after every step; the average is then what is judged and saved
    strategy: str = "none"  # ddp: a replica a process; fsdp: weights, gradients and optimiser state shared out
    processes: int = 1  # on this machine, one GPU each where there are GPUs
    spike_deviations: float = 6.0  # a loss this far above the running median is a spike
    samples: int = 2  # texts written at the end and at every eval.every; 0: none
    sample_tokens: int | None = None  # new tokens of each; None: 128, or fewer where seq_len ends
    log_every: int = 10  # steps
    save_every: int | None = None  # steps between checkpoints; None: only at the end
    keep_checkpoints: int = 2
    memory: bool = True  # measure peak memory in fresh processes before training

    def check(self) -> None:
        for name in ("steps", "seq_len", "batch_size", "log_every", "keep_checkpoints"):
            _positive(f"trainer.{name}", getattr(self, name))
        if self.save_every is not None:
            _positive("trainer.save_every", self.save_every)
        _choice("trainer.device", self.device, DEVICES)
        _choice("trainer.precision", self.precision, PRECISIONS)
        _choice("trainer.activation_checkpointing", self.activation_checkpointing, CHECKPOINTING)
        if self.threads is not None:
            _positive("trainer.threads", self.threads)
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ConfigError(f"trainer.ema_decay={self.ema_decay} is not between 0 and 1; use 0.999, or null for none")
        _positive("trainer.spike_deviations", self.spike_deviations)
        if self.samples < 0:
            raise ConfigError(f"trainer.samples={self.samples} is negative; use 0 for none")
        if self.sample_tokens is not None:
            _positive("trainer.sample_tokens", self.sample_tokens)
            if not self.samples:
                raise ConfigError(f"trainer.sample_tokens={self.sample_tokens} has no effect: trainer.samples is 0; drop one")
        self._check_processes()
        if self.micro_batch is not None:
            _positive("trainer.micro_batch", self.micro_batch)
            _divides("trainer.batch_size / trainer.processes", self.rows, "trainer.micro_batch", self.micro_batch)

    def _check_processes(self) -> None:
        _choice("trainer.strategy", self.strategy, STRATEGIES)
        _positive("trainer.processes", self.processes)
        if self.processes > 1 and self.strategy == "none":
            raise ConfigError(
                f"trainer.processes={self.processes} has no effect: trainer.strategy is none; use trainer.strategy=ddp or fsdp"
            )
        _divides("trainer.batch_size", self.batch_size, "trainer.processes", self.processes)
        if self.compile and self.strategy == "fsdp":
            raise ConfigError(
                "trainer.compile=true and trainer.strategy=fsdp do not go together: the gathering of shards breaks the "
                "graph; use trainer.strategy=ddp or trainer.compile=false"
            )

    @property
    def rows(self) -> int:
        """Sequences of one process in a step."""
        return self.batch_size // self.processes

    @property
    def forward_rows(self) -> int:
        """Sequences of one forward."""
        return self.micro_batch or self.rows

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


@dataclass(kw_only=True)
class TrackingConfig:
    """The JSONL in the run directory is the record; W&B mirrors it. `auto`: online only with a key, else offline."""

    mode: str = "auto"
    project: str = "xattn"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None
    log_model: bool = False  # the finished model as a W&B artifact
    timeout: float = 30.0  # seconds to wait for the W&B server, at the start and again at the end
    tensorboard: bool = False  # event files in RUN_DIR/tensorboard as well

    def check(self) -> None:
        _choice("tracking.mode", self.mode, TRACKING_MODES)
        _positive("tracking.timeout", self.timeout)
        if self.log_model and self.mode == "disabled":
            raise ConfigError("tracking.log_model=true has no effect: tracking.mode is disabled; use tracking.mode=auto")


@dataclass(kw_only=True)
class PasskeyConfig:
    """A key planted in a prompt and asked for at its end, at every evaluation length; see experiments/passkey.py."""

    trials: int = 0  # prompts of each length and depth; 0: retrieval is not judged
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])  # 0: key at the start, 1: at the end
    seed: int = 0  # of keys, filler and places

    def check(self) -> None:
        if self.trials < 0:
            raise ConfigError(f"eval.passkey.trials={self.trials} is negative; use 0 for none")
        if not self.depths or not all(0.0 <= depth <= 1.0 for depth in self.depths):
            raise ConfigError(f"eval.passkey.depths={list(self.depths)} must be at least one depth from 0 to 1; use [0,0.5,1]")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"eval.passkey.seed={self.seed} is not in 0..2**32-1; use 0")
        given = [name for name in ("depths", "seed") if getattr(self, name) != getattr(PasskeyConfig(), name)]
        if given and not self.trials:
            raise ConfigError(f"eval.passkey.{given[0]} has no effect: eval.passkey.trials is 0; use eval.passkey.trials=20")


@dataclass(kw_only=True)
class DecodeConfig:
    """Decoding over a cache, measured in a fresh process at every evaluation length; see experiments/decode.py."""

    tokens: int | None = None  # new tokens, timed; 0: not measured. None: 32 in xattn-eval and in a study, 0 in xattn-train
    batch: int = 1  # sequences side by side

    def check(self) -> None:
        if self.tokens is not None and self.tokens < 0:
            raise ConfigError(f"eval.decode.tokens={self.tokens} is negative; use 0 for none")
        _positive("eval.decode.batch", self.batch)
        if self.batch != DecodeConfig.batch and self.tokens == 0:
            raise ConfigError(f"eval.decode.batch={self.batch} has no effect: eval.decode.tokens is 0; use eval.decode.tokens=32")


@dataclass(kw_only=True)
class EvalConfig:
    """One fixed set of validation tokens, judged at several lengths and with evaluation-time flags."""

    tokens: int = 65_536  # validation tokens predicted, the same ones at every length
    every: int | None = None  # steps between evaluations while training; None: only at the end
    every_tokens: int = 8_192  # how many of the tokens those use
    batch_tokens: int = 8_192  # tokens a forward; changes speed and memory, never a result
    length_factors: list[int] = field(default_factory=lambda: [1, 2, 4])  # times trainer.seq_len
    flags: dict[str, Any] = field(default_factory=dict)  # evaluation-time flags of every evaluation
    extensions: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> evaluation-time flags
    position_buckets: int = 8
    pair_factors: list[int] = field(default_factory=list)  # times data.task.pairs, judged at every length with room for them
    passkey: PasskeyConfig = field(default_factory=PasskeyConfig)
    # keys that selective layers keep: a count, a fraction of trainer.seq_len, or a list of these and null a layer
    kv_budgets: list[Any] = field(default_factory=list)
    kv_budget_chunk: int = 1  # tokens a call under a budget: 1 prunes as decoding does, more is faster and prunes less
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def check(self) -> None:
        for name in ("tokens", "every_tokens", "batch_tokens", "position_buckets"):
            _positive(f"eval.{name}", getattr(self, name))
        if self.every is not None:
            _positive("eval.every", self.every)
        if not self.length_factors or min(self.length_factors) < 1 or 1 not in self.length_factors:
            raise ConfigError(
                f"eval.length_factors={list(self.length_factors)} must hold 1 (the trained length) and nothing "
                "below it; use [1,2,4]"
            )
        if any(factor < 1 for factor in self.pair_factors):
            raise ConfigError(f"eval.pair_factors={list(self.pair_factors)} must be 1 or more each; use [2,4]")
        if "none" in self.extensions:
            raise ConfigError("eval.extensions: the name none is taken by the model as trained; use another name")
        self.passkey.check()
        self.decode.check()
        _positive("eval.kv_budget_chunk", self.kv_budget_chunk)
        if self.kv_budget_chunk != 1 and not self.kv_budgets:
            raise ConfigError(
                f"eval.kv_budget_chunk={self.kv_budget_chunk} has no effect: eval.kv_budgets is empty; use eval.kv_budgets=[0.5]"
            )


@dataclass(kw_only=True)
class RunConfig:
    """One training run. `isolate`: in a worker process of its own, which is what makes its memory figures true."""

    name: str = "run"
    seed: int = 0
    isolate: bool = True
    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def check(self) -> None:
        """Raise ConfigError for the first field that cannot be; compose.py has xattn.parse check the model flags."""
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} is not in 0..2**32-1; use seed=0")
        for group in (self.data, self.optim, self.schedule, self.trainer, self.tracking, self.eval):
            group.check()
        if self.eval.passkey.trials and self.data.source == "bin":
            raise ConfigError(
                f"eval.passkey.trials={self.eval.passkey.trials} writes a sentence into text, and data.source=bin has no "
                "tokeniser to write with; use data.source=text, or eval.passkey.trials=0"
            )
        self._check_task()
        if self.eval.decode.tokens and not self.isolate:
            raise ConfigError(
                f"eval.decode.tokens={self.eval.decode.tokens} starts a process of its own, and isolate=false asks for none; "
                "use isolate=true or eval.decode.tokens=0"
            )
        if self.trainer.strategy != "none" and not self.isolate:
            raise ConfigError(
                f"trainer.strategy={self.trainer.strategy} starts processes of its own, and isolate=false asks for none; "
                "use isolate=true or trainer.strategy=none"
            )

    def _check_task(self) -> None:
        factors, task = self.eval.pair_factors, self.data.task.settled(self.trainer.seq_len)
        if factors and (self.data.source != "task" or task.pairs is None):
            raise ConfigError(f"eval.pair_factors={list(factors)} has no effect: the data has no pairs; use data=mqar")
        if self.data.source != "task":
            return
        if self.eval.passkey.trials:
            raise ConfigError(
                f"eval.passkey.trials={self.eval.passkey.trials} is for texts, and a task is judged by its answers; drop it"
            )
        task.check_room(self.trainer.seq_len, task.pairs)
        if task.pairs is not None:
            task.check_names(task.pairs * max(factors, default=1))


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """xattn-train: one run (or, with -m, several) and where it goes."""

    run_dir: str = "runs/${name}"


@dataclass(kw_only=True)
class MemoryCurveConfig:
    """Peak memory of one sequence against its length, measured for every variant in fresh processes."""

    kinds: list[str] | None = None  # train, infer; []: no curve. None: both, where isolate and trainer.memory are true
    length_factors: list[int] | None = None  # times trainer.seq_len; None: 1 to 16 on the CPU, on CUDA until it is full
    seconds: float = 60.0  # of one variant and kind, all lengths together
    cpu_limit_gib: float = 4.0  # where a curve on the CPU runs out of memory

    def check(self, *, isolate: bool) -> None:
        for kind in self.kinds or ():
            _choice("memory_curve.kinds", kind, PROBES)
        if self.kinds and not isolate:
            raise ConfigError(
                f"memory_curve.kinds={list(self.kinds)} starts processes of its own, and isolate=false asks for none; "
                "use isolate=true or drop it"
            )
        if self.length_factors is not None and (not self.length_factors or min(self.length_factors) < 1):
            raise ConfigError(f"memory_curve.length_factors={list(self.length_factors)} must be 1 or more each; use [1,2,4,8]")
        _positive("memory_curve.seconds", self.seconds)
        _positive("memory_curve.cpu_limit_gib", self.cpu_limit_gib)


@dataclass(kw_only=True)
class BudgetSearchConfig:
    """The fewest keys with which a selective run still has the baseline's loss; see experiments/search.py."""

    step: float | None = None  # keys taken from a layer at a time; below 1: a share of those it has. None: no search
    tokens: int = 16_384  # validation tokens of the search; what it finds is judged on eval.tokens
    chunk: int = 16  # tokens a call of the search; 1 prunes as decoding does

    def check(self) -> None:
        if self.step is not None and not (0 < self.step < 1 or (self.step >= 1 and self.step == int(self.step))):
            raise ConfigError(f"budget_search.step={self.step} is no count of keys and no share below 1; use 0.5")
        _positive("budget_search.tokens", self.tokens)
        _positive("budget_search.chunk", self.chunk)


@dataclass(kw_only=True)
class CompareConfig(RunConfig):
    """xattn-compare: variants x seeds of one shared run config. `runs` only reports on finished run directories."""

    study: str = "study"
    description: str | None = None
    variants: dict[str, Any] = field(default_factory=dict)  # name -> model flags that differ from the shared ones
    baseline: str | None = None  # None: the first variant
    seeds: list[int] = field(default_factory=lambda: [0])
    extended: list[str] | None = None  # variants that eval.extensions are tried on; None: all
    dir: str = "runs/${study}"
    runs: str | None = None
    # Rows further from the baseline's parameter count are marked not comparable. None: what the study had, 0.02 for a new one.
    param_tolerance: float | None = None
    plots: bool = True
    jobs: int = 1  # runs at a time; on CUDA they are dealt out to the devices
    reuse: list[str] = field(default_factory=list)  # studies whose runs of the same config are taken over, where they are there
    lrs: list[float] = field(default_factory=list)  # every variant at each of these in place of optim.lr, as NAME-lrLR
    memory_curve: MemoryCurveConfig = field(default_factory=MemoryCurveConfig)
    budget_search: BudgetSearchConfig = field(default_factory=BudgetSearchConfig)

    def check(self) -> None:
        super().check()
        if self.param_tolerance is not None and self.param_tolerance < 0:
            raise ConfigError(f"param_tolerance={self.param_tolerance} is negative; use 0.02 for 2 %")
        self.budget_search.check()
        if self.budget_search.step is not None and self.data.source in ("task", "passkey"):
            raise ConfigError(
                f"budget_search.step={self.budget_search.step} is for texts, and data.source={self.data.source} is judged by its "
                "answers; use eval.kv_budgets"
            )
        _positive("jobs", self.jobs)
        if self.jobs > 1 and not self.isolate:
            raise ConfigError(
                f"jobs={self.jobs} starts a process a run, and isolate=false asks for none; use isolate=true or jobs=1"
            )
        if self.jobs > 1 and self.trainer.strategy != "none":
            raise ConfigError(
                f"jobs={self.jobs} gives every run one device, and trainer.strategy={self.trainer.strategy} several; use jobs=1"
            )
        for lr in self.lrs:
            _positive("lrs", lr)
        self.memory_curve.check(isolate=self.isolate)


@dataclass(kw_only=True)
class EvaluateConfig:
    """xattn-eval: judge a finished run again, with other lengths or evaluation-time flags."""

    run: str = "???"
    out: str | None = None  # None: evaluations/<number>.json in the run directory
    eval: EvalConfig = field(default_factory=EvalConfig)


def check_packages(config: RunConfig) -> None:
    """Raise ConfigError for what needs a package that is not there. Not part of `check`: old runs read without it."""
    if config.tracking.tensorboard:
        check_tensorboard()
    for what, wanted, package, other in (
        ("data.source=hf", config.data.source == "hf", "datasets", "data=text"),
        ("data.tokenizer=bpe", config.data.tokenizer == "bpe", "tokenizers", "data.tokenizer=bytes"),
        ("data.tokenizer=gpt2", config.data.tokenizer == "gpt2", "tiktoken", "data.tokenizer=bytes"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{what} needs the package {package}; pip install 'xattn[data]', or use {other}")


def check_tensorboard() -> None:
    """Raise ConfigError where tracking.tensorboard=true cannot be served."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tracking.tensorboard=true needs the package tensorboard; pip install tensorboard, or drop the flag")


def _choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ConfigError(f"{name}={given} is not known; use one of {', '.join(choices)}")


def _positive(name: str, given: float) -> None:
    if not given > 0:
        raise ConfigError(f"{name}={given} is not positive; use a value above 0")


def _divides(name: str, whole: int, part_name: str, part: int) -> None:
    if whole % part:
        fits = tuple(n for n in range(1, whole + 1) if whole % n == 0)
        raise ConfigError(f"{name}={whole} is not a multiple of {part_name}={part}; use {part_name} in {fits}")
