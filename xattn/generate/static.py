"""StaticStep: decoding one token a row in shapes that never change; on a GPU as the replay of a CUDA graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xattn.cache.cache import Cache
from xattn.cache.static import StaticCache
from xattn.errors import ConfigError, ShapeError

# steps that run before one is captured: kernels are compiled and libraries set up in them
WARM_UP = 2
# with fewer steps to come a capture is not worth its while
LEAST_STEPS = 16


class StaticStep:
    """`step(token_b) -> logits (b v)`: a model reads one token a row and says what comes next, over a cache that it changes.

    Nothing in a step depends on numbers of the host, and no shape on how far rows are. On a GPU the first `WARM_UP` calls
    run as they are, the next one is captured as a CUDA graph, and from then on a call is a replay. Between calls the cache is
    what ordinary calls would have made of it: it may be cropped, cloned, or read on; then begin new steps.

    Args:
        net: a `TransformerWrapper`, whose parameters must stay where they are. cache: what it has read.
        max_len: tokens a row that the cache is allocated for now, and the steps refuse to exceed (default: the cache's).
        extrapolate: allow more than max_seq_len tokens.
    Raises:
        ConfigError: no max_len, or a net with hooks, which a replay would pass over. TokenError: a max_len beyond the model's.
    """

    def __init__(self, net: nn.Module, cache: Cache, *, max_len: int | None = None, extrapolate: bool = False) -> None:
        refuse_hooks(net)
        self.static = StaticCache(cache, max_len=max_len)
        net.check_length(self.static.reach + 1, extrapolate=extrapolate)
        self.net, self.extrapolate = net, extrapolate
        self.ids_b1 = torch.zeros(cache.batch, 1, dtype=torch.long, device=cache.device)
        self._compiled: Any = None
        self._own_graphs = False
        self._graph: Any = None
        self._stream: Any = None
        self._logits_bv: Tensor | None = None
        self._warm = 0

    @torch.no_grad()
    def __call__(self, token_b: Tensor) -> Tensor:
        """Logits (b v), float32 or better, of the token after these; on a GPU they hold until the next call.

        Raises:
            ConfigError: the cache has been used otherwise since the first call. TokenError: more tokens than max_len.
        """
        if token_b.shape != self.ids_b1.shape[:1]:
            raise ShapeError(f"a static step takes one token for each of {len(self.ids_b1)} rows, not {tuple(token_b.shape)}")
        with self.static.step():
            self.ids_b1.copy_(token_b[:, None])
            return self._run()

    def compile(self, *, mode: str | None = None, **options: Any) -> "StaticStep":
        """The same, by torch.compile(fullgraph=True, mode=mode, **options); what the compiler makes is captured like the rest.

        With mode "reduce-overhead" or "max-autotune" the compiler makes its own CUDA graphs, and nothing is captured here.
        """
        self._own_graphs = mode in ("reduce-overhead", "max-autotune")
        if self._own_graphs:
            # it takes tensors that a step changes into a graph only where they are known to stay
            for store in (self.ids_b1, *self.static.stores()):
                torch._dynamo.mark_static_address(store)
        self._compiled = torch.compile(self._compute, fullgraph=True, mode=mode, **options)
        self._graph, self._warm = None, 0
        return self

    def compute(self) -> Tensor:
        """What a step does on the device, from `ids_b1` to logits."""
        return self._compute() if self._compiled is None else self._compiled()

    def reorder(self, index_b: Tensor) -> None:
        """Row r goes on as row index[r] did, in place, as beams do."""
        self.static.reorder(index_b)

    def _compute(self) -> Tensor:
        logits_bv = self.net(self.ids_b1, cache=self.static, extrapolate=self.extrapolate)[:, -1]
        return logits_bv.to(torch.promote_types(logits_bv.dtype, torch.float32))

    def _run(self) -> Tensor:
        if self.ids_b1.device.type != "cuda" or self._own_graphs:
            return self.compute()
        if self._graph is None and self._warm < WARM_UP:
            self._warm += 1
            return self._beside()
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._logits_bv

    def _beside(self) -> Tensor:
        """A step on the stream that will be captured, whose libraries then have what they need."""
        here = torch.cuda.current_stream(self.ids_b1.device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.ids_b1.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream), weights_cast_anew("cuda"):
            logits_bv = self.compute()
        here.wait_stream(self._stream)
        logits_bv.record_stream(here)
        return logits_bv

    def _capture(self) -> None:
        """Records the step, without running it."""
        graph = torch.cuda.CUDAGraph()
        # other threads, such as those that load data, may call CUDA meanwhile
        how = {"stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with weights_cast_anew("cuda"), torch.cuda.graph(graph, **how):
                self._logits_bv = self.compute()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(f"the step cannot be a CUDA graph: {error}; generate with static=False") from error
        self._graph = graph


@contextmanager
def weights_cast_anew(device_type: str) -> Iterator[None]:
    """Autocast, where it is on, without its store of weights: a graph outlives what that holds."""
    if not torch.is_autocast_enabled(device_type):
        yield
        return
    with torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), cache_enabled=False):
        yield


def hooked(net: nn.Module) -> bool:
    """Whether any module has forward hooks."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def refuse_hooks(net: nn.Module) -> None:
    """Raises ConfigError for hooks, which the replay of a graph would pass over."""
    if hooked(net):
        raise ConfigError("static steps would pass over the model's forward hooks; remove them, or pass static=False to generate")


def is_static(asked: bool | None, net: nn.Module, *, cached: bool, steps: int) -> bool:
    """Whether a generation of that many steps takes static ones: asked for, or on a GPU where they pay.

    Raises:
        ConfigError: asked for without a cache, or for a net with hooks.
    """
    if asked is None:
        pays = net.head_vm.device.type == "cuda" and steps >= LEAST_STEPS
        return cached and pays and not hooked(net)
    if asked and not cached:
        raise ConfigError("static=True has no effect: cache_kv is False; set it or drop static")
    if asked:
        refuse_hooks(net)
    return asked
