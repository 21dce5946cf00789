"""Compiled passes: denoising, with and without maps, and the guided forward with its backward, each as one graph."""

from __future__ import annotations

import itertools
import logging
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from platformdirs import user_cache_path
from torch import Tensor
from torch.overrides import TorchFunctionMode

from aae_batch.sampling.model.recorder import AttentionRecorder, is_compiled

Forward = Callable[[Tensor, Tensor, dict[str, Tensor], int], Tensor]
"""As `Network._repeated`."""

Kind = Literal["guided", "recorded", "plain"]
"""A forward for the maps alone, one for prediction and maps, and one for the prediction alone."""

BACKEND = "inductor"

FIXED = {"cuda": 16}
"""By the kind of device, up to how many samples a pass is compiled for just so many. On a GPU it is then replayed as a
CUDA graph, since so few are computed faster than launched."""

BRIEF, PATIENCE = 20.0, 180.0
"""Seconds that a pass runs as it is before it is compiled, in Python and in a job. Compiling takes about a minute, and makes a
pass a third faster: it is paid when it would have paid for itself already, and never by a short job."""

logger = logging.getLogger("aae_batch.compiled")

_numbers = itertools.count()


class Made(NamedTuple):
    """What a pass made."""

    predicted: Tensor | None
    maps: Tensor | None
    affinity: Tensor | None


@dataclass(frozen=True)
class _Pass:
    """What one graph is compiled for.

    Attributes:
        samples: how many; None for any number.
        texts: of each sample.
        shapes: of one row of each input.
    """

    kind: Kind
    affinity: bool
    samples: int | None
    texts: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def __str__(self) -> str:
        names = {"guided": "guided pass", "recorded": "denoising with maps", "plain": "denoising"}
        return names[self.kind] + ("" if self.samples is None else f" of {self.samples}")


class CompiledPasses:
    """Runs a network's passes compiled, once they have run as they are for some time.

    Up to `FIXED` samples, which are padded to a power of two, a pass is compiled for each number of them; above, for
    any number.

    Args:
        patience: seconds that a pass runs as it is before it is compiled.
        tell: called with a sentence when compiling begins and ends.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        forward: Forward,
        recorder: AttentionRecorder,
        patience: float,
        tell: Callable[[str], None],
    ) -> None:
        self.recorder = recorder
        self.hooks = hooks_of(network)
        self._network = network
        self._forward = forward
        self._patience, self._tell = patience, tell
        device = next(network.parameters()).device
        self._on_gpu = device.type == "cuda"
        self._fixed = FIXED.get(device.type, 1)
        self._spent: defaultdict[_Pass, float] = defaultdict(float)
        self._ran: list[_Pass] = []
        self._compiled: dict[_Pass, Callable[..., Any]] = {}
        self._failed: set[_Pass] = set()
        self._is_laid_out = False
        self.seconds = 0.0
        """Time spent on compiling."""

    def run(
        self,
        kind: Kind,
        latents: Tensor,
        timesteps: Tensor,
        text: dict[str, Tensor],
        affinity: bool = False,
        sample_of: Sequence[int] = (),
    ) -> Made | None:
        """Run a pass, compiled. Returns the prediction unless it is guided, the maps of all rows unless it is plain,
        and their affinity if asked for; None if the pass is to run as it is this time.

        Args:
            latents, timesteps, text: as `Network._forward` takes them.
            sample_of: as in `Network.denoise`.
        """
        if kind != "plain" and not self.recorder.records_whole:
            return None
        count = len(set(sample_of)) or len(latents)
        texts, rest = divmod(len(latents), count)
        if rest or list(sample_of) != [*range(count)] * texts:
            count, texts = len(latents), 1
        samples = 1 << (count - 1).bit_length()  # the next power of two
        fixed = samples <= self._fixed
        inputs = {"latents": latents[:count], "timesteps": timesteps[:count]}
        inputs |= {name: one.unflatten(0, (texts, count)) for name, one in text.items()}
        shapes = tuple((name, tuple(one.shape[1:])) for name, one in text.items())
        shapes += (("latents", tuple(latents.shape[1:])),)
        this = _Pass(kind, affinity, samples if fixed else None, texts, shapes)
        if this in self._failed:
            return None
        if this not in self._compiled and self._spent[this] < self._patience:
            self._ran.append(this)
            return None
        for name, one in inputs.items():
            axis = int(name in text)
            if fixed:
                inputs[name] = _padded(one, samples, axis)
            else:
                torch._dynamo.mark_dynamic(one, axis)
        latents, timesteps, *bag = inputs.values()
        arguments = latents, timesteps, dict(zip(text, bag, strict=True))
        try:
            made = self._run(this, arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if isinstance(getattr(error, "inner_exception", None), torch.OutOfMemoryError):
                raise torch.OutOfMemoryError(str(error)) from error
            self._failed.add(this)
            logger.warning(
                "the %s could not be compiled and runs as it is from here on: %s: %s",
                this,
                type(error).__name__,
                " ".join(str(error).split("\n")[:2]),
            )
            return None
        return Made(*(None if one is None else one[:, :count].flatten(0, 1) for one in made))

    def ran(self, seconds: float) -> None:
        """Tell how long the passes since the last call took."""
        for this in self._ran:
            self._spent[this] += seconds / len(self._ran)
        self._ran.clear()

    def close(self) -> None:
        """Leave the network as others expect it."""
        if self._is_laid_out:
            self._lay_out(torch.contiguous_format)

    def _run(self, this: _Pass, arguments: tuple[Any, ...]) -> Any:
        graphed = self._on_gpu and this.samples is not None
        is_new = this not in self._compiled
        if is_new:
            self._tell(f"compiling the {this}; this takes a minute or two, less the next time")
            keep_compiled_code()
            options: dict[str, Any] | None = None
            if self._on_gpu:
                options = {"force_layout_optimization": True, "triton.cudagraphs": graphed}
            self._compiled[this] = torch.compile(
                self._function(this), backend=BACKEND, fullgraph=True, options=options
            )
        if self._on_gpu and not self._is_laid_out:
            self._lay_out(torch.channels_last)
        graphs, start = _count_graphs(), time.perf_counter()
        with self._state(this), _hushed() if is_new else nullcontext():
            made = self._compiled[this](*arguments)
            if _count_graphs() > graphs and arguments[0].requires_grad:
                # the backward is compiled when it first runs
                maps = [one.sum() for one in made if one is not None]
                torch.autograd.grad(maps, arguments[0])
                made = self._compiled[this](*arguments)
        if _count_graphs() > graphs:  # also for numbers of rows that need other code
            taken = time.perf_counter() - start
            self.seconds += taken
            self._tell(f"compiled the {this}; that took {taken:.0f} s")
        if graphed:  # the next replay writes over what this one made
            made = [None if one is None else one.clone() for one in made]
        return made

    def _lay_out(self, memory_format: torch.memory_format) -> None:
        """Lay out the weights. cuDNN convolves in channels_last, and would convert to it and back; what is not compiled
        is slower in it."""
        self._network.to(memory_format=memory_format)  # type: ignore[call-overload]
        self._is_laid_out = memory_format is torch.channels_last

    def _function(self, this: _Pass) -> Callable[..., Any]:
        """Return what is compiled: a function of latents and timesteps of some samples, and of their texts,
        [texts, samples, ...]. It returns the parts of `Made`, each [texts, samples, ...] or None."""
        forward, recorder, kind, affinity = self._forward, self.recorder, this.kind, this.affinity

        def run(latents: Tensor, timesteps: Tensor, text: dict[str, Tensor]) -> list[Tensor | None]:
            texts, samples = this.texts, len(latents)
            rows = {name: one.flatten(0, 1) for name, one in text.items()}
            made: list[Tensor | None] = [None, None, None]
            if kind == "guided":
                recorder.begin()
                with _FrozenConvolutions():  # the compiler leaves out what the maps do not need
                    forward(latents, timesteps, rows, texts)
                made[1:] = recorder.take(affinity)
            elif kind == "recorded":
                recorder.begin()
                made = [forward(latents, timesteps, rows, texts), *recorder.take(affinity)]
            else:
                made[0] = forward(latents, timesteps, rows, texts)
            return [None if one is None else one.unflatten(0, (texts, samples)) for one in made]

        # The compiler remembers by code, and looks through all that it has of one code.
        run.__code__ = run.__code__.replace(co_name=f"{kind}_{next(_numbers)}")
        return run

    @contextmanager
    def _state(self, this: _Pass) -> Iterator[None]:
        """Let the network's layers be read inside the block if the pass needs maps."""
        if this.kind == "plain":
            self.recorder.close()
            yield
            return
        with self.recorder.recording_whole(this.affinity):
            yield


class _FrozenConvolution(torch.autograd.Function):
    """A convolution whose weights have no gradient. Its backward is a convolution too, which compilers know how to lay
    out, and unlike torch's own it needs nothing of the input, which then is not kept."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.how, ctx.size = how, given.shape[2:]
        return torch.conv2d(given, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        missing = [
            size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
            for size, out, k, s, p, d in zip(
                ctx.size, slope.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
            )
        ]
        moved = torch.conv_transpose2d(
            slope, weight, None, stride, padding, missing, groups, dilation
        )
        return moved, None, None, None, None, None, None


class _FrozenConvolutions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None):
        is_known = function is torch.conv2d and len(arguments) == 7 and not named
        if is_known and all(isinstance(one, tuple) for one in arguments[3:6]):
            return _FrozenConvolution.apply(*arguments)
        return function(*arguments, **(named or {}))


@contextmanager
def _hushed() -> Iterator[None]:
    """Show none of the compiler's warnings about diffusers' code and torch's settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _padded(tensor: Tensor, size: int, axis: int) -> Tensor:
    """Repeat the last entry along an axis up to a size."""
    missing = size - tensor.shape[axis]
    if missing == 0:
        return tensor
    last = tensor.narrow(axis, tensor.shape[axis] - 1, 1)
    return torch.cat([tensor, *[last] * missing], dim=axis)


def _count_graphs() -> int:
    """Return how many graphs this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def keep_compiled_code() -> None:
    """Let compiled code be found again after a restart, unless the user has said where it goes."""
    folder = user_cache_path("aae-batch") / "compiled"
    with suppress(OSError):  # otherwise it goes where torch puts it
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def hooks_of(network: torch.nn.Module) -> frozenset[tuple[int, int]]:
    """Return which hooks a network has: compiled code does not notice later ones."""
    return frozenset(
        (id(module), number)
        for module in network.modules()
        for number in (*module._forward_hooks, *module._forward_pre_hooks)
    )


def why_not_compiled(network: torch.nn.Module) -> str | None:
    """Return what keeps a network from being compiled, in words; None for nothing."""
    if any(hasattr(module, "_hf_hook") for module in network.modules()):
        return "its weights are moved or placed by accelerate"
    if is_compiled(network):
        return "it, or a part of it, is compiled already"
    return None
