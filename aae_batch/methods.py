"""The methods: each a choice of texts, an objective, how far it moves the latents, and where they start.

Nothing here needs torch: the table is read wherever a method is named, by the command line too. An objective
is named by where it stands, and imported when the first sample needs it.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal

from aae_batch.errors import SettingsError

if TYPE_CHECKING:
    from aae_batch.sampling.objectives import Objective

Texts = Literal["whole", "conjuncts", "phrases"]
Need = Literal["modifiers", "affinity"]

PLUGINS = "aae_batch.methods"
"""Entry points of this group are modules that register methods."""


@dataclass(frozen=True)
class Steering:
    """When an objective moves the latents, and how far. Names are those of diffusers'
    `StableDiffusionAttendAndExcitePipeline`, defaults those of Attend-and-Excite.

    Attributes:
        max_iter_to_alter: the steps before this one are guided.
        thresholds: step -> what the objective's `reached` must come to; until then the step refines.
        max_refinement_steps: updates by refinement at one step, at most.
        scale_factor: the factor of the gradient at the first step.
        scale_range: the factor falls over all steps as the root of this range.
    """

    max_iter_to_alter: int = 25
    thresholds: Mapping[int, float] = field(default_factory=lambda: {0: 0.05, 10: 0.5, 20: 0.8})
    max_refinement_steps: int = 20
    scale_factor: float = 20.0
    scale_range: tuple[float, float] = (1.0, 0.5)


@dataclass(frozen=True)
class NoiseSearch:
    """The start noise is optimised before the first step (InitNO, arXiv 2404.04650, section 3).

    Attributes:
        rounds: each after the first begins with other noise.
        steps: noises that are tried in a round, at most, one guided forward each.
        learning_rate: of Adam, on the mean and the logarithm of the variance.
        target: what the objective's `reached` must come to; the search then ends.
        most_divergence: from the standard normal distribution, the mean over elements, in nats.
    """

    rounds: int = 5
    steps: int = 10
    learning_rate: float = 0.01
    target: float = 0.8
    most_divergence: float = 0.001


@dataclass(frozen=True)
class Method:
    """One way to sample.

    Attributes:
        summary: what it does, in a few words.
        texts: what a sample is denoised under: the prompt; each conjunct of it by itself; the prompt
            with the values of its noun phrases.
        objective: what the latents are moved down, or `"module:name"` of it; None for no guidance.
        steering: of the objective.
        start: how the noise is found; None for noise as it is drawn.
        needs: what the objective cannot do without: a subject with modifiers, as "red" is in "red circle";
            self-attention (`Seen.affinity`).
        least_subjects: how many subjects a row must name.
        version: what tells this method from an earlier one of the same name; a dataset is not
            continued with another. Empty for that of the package.
    """

    summary: str
    texts: Texts = "whole"
    objective: Objective | str | None = None
    steering: Steering = Steering()
    start: NoiseSearch | None = None
    needs: frozenset[Need] = frozenset()
    least_subjects: int = 0
    version: str = ""

    @property
    def is_guided(self) -> bool:
        return self.objective is not None

    def load_objective(self) -> Objective | None:
        """The objective itself."""
        if isinstance(self.objective, str):
            return pkgutil.resolve_name(self.objective)
        return self.objective


def _own(name: str) -> str:
    """An objective of this package: a function that has the name of its module."""
    return f"aae_batch.sampling.objectives.{name}:{name}"


BASELINE = "stable-diffusion"
"""Plain sampling, which the others are compared with."""

DEFAULT = "attend-and-excite"

METHODS: dict[str, Method] = {
    BASELINE: Method("no guidance"),
    "composable-diffusion": Method(
        "each part of 'a cat and a dog' by itself, scores added; a forward more for each",
        texts="conjuncts",
    ),
    "structure-diffusion": Method("values of noun phrases in cross-attention", texts="phrases"),
    DEFAULT: Method(
        "the most neglected subject gets a place of strong attention",
        objective=_own("attend_and_excite"),
        least_subjects=1,
    ),
    "divide-and-bind": Method(
        "subjects in patches, adjectives where their nouns are",
        objective=_own("divide_and_bind"),
        steering=Steering(thresholds={0: 0.05, 10: 0.2, 20: 0.3}),
        least_subjects=1,
    ),
    "syngen": Method(
        "adjectives where their nouns are, and away from all other words",
        objective=_own("syngen"),
        steering=Steering(thresholds={}, scale_range=(1.0, 1.0)),
        needs=frozenset({"modifiers"}),
        least_subjects=1,
    ),
    "conform": Method(
        "words of one subject attract each other, those of others repel",
        objective=_own("conform"),
        steering=Steering(thresholds={0: 1.0, 10: 1.0, 20: 1.0}),
        least_subjects=2,
    ),
    "initno": Method(
        "better noise to begin with: every subject attended to, and none out of another's region",
        objective=_own("initno"),
        steering=Steering(thresholds={10: 0.8, 20: 0.8}),
        start=NoiseSearch(),
        needs=frozenset({"affinity"}),
        least_subjects=1,
    ),
    "self-cross": Method(
        "as initno, and no subject attends to where another is",
        objective=_own("self_cross"),
        steering=Steering(thresholds={10: 0.8, 20: 0.8}),
        start=NoiseSearch(),
        needs=frozenset({"affinity"}),
        least_subjects=2,
    ),
    "focus": Method(
        "words of a subject agree, subjects differ",
        objective=_own("focus"),
        steering=Steering(thresholds={}),
        least_subjects=2,
    ),
    "predicated": Method(
        "the prompt as propositions: every noun is somewhere, and its adjectives are where it is",
        objective=_own("predicated"),
        steering=Steering(thresholds={0: 1.0}, max_refinement_steps=5),
        least_subjects=1,
    ),
}
"""By the names that manifests use, in the order of a comparison: the baselines of Attend-and-Excite's paper,
Attend-and-Excite, and what came after it."""


def register_method(name: str, method: Method) -> None:
    """Let manifests and settings name a method of your own.

    Raises:
        SettingsError: the name is taken, or is no name for a column's value and a file.
    """
    if not name or not name.replace("-", "").replace("_", "").isalnum():
        raise SettingsError(f"A method cannot be called {name!r}; use letters, digits and '-'.")
    if METHODS.setdefault(name, method) != method:
        raise SettingsError(f"There is a method {name!r} already; register yours by another name.")


def load_plugins(modules: Sequence[str]) -> dict[str, str]:
    """Import modules that register methods, and those that installed packages bring. Modules are looked
    for in the current folder, too.

    Returns:
        The methods that are not of this package, and for each its version, or else a digest of the
        module's source that its objective stands in.

    Raises:
        SettingsError: there is no such module, or it cannot be imported.
    """
    for module in (*modules, *(found.value for found in entry_points(group=PLUGINS))):
        _import(module)
    foreign = {name: method for name, method in METHODS.items() if name not in _OWN_METHODS}
    return {name: method.version or _source_digest(method) for name, method in foreign.items()}


def _import(module: str) -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        import_module(module)
    except SettingsError:
        raise
    except Exception as error:
        raise SettingsError(
            f"--plugin {module} cannot be imported ({type(error).__name__}: {error}); name a module that "
            "Python finds here and on every machine of the cluster."
        ) from error


def _source_digest(method: Method) -> str:
    module = sys.modules.get(getattr(method.load_objective(), "__module__", ""))
    try:
        source = inspect.getsource(module) if module else ""
    except OSError:
        source = ""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


_OWN_METHODS = frozenset(METHODS)
