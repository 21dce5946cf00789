"""The methods. Each combines texts, an objective, its steering, and a search for the start noise.

This module does not import torch, because the table is read wherever a method is named, also by the
command line. An objective is given as `"module:name"` and imported when the first sample needs it.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal

from aae_batch.errors import SettingsError

if TYPE_CHECKING:
    from aae_batch.sampling.objectives import Objective

Texts = Literal["whole", "conjuncts", "phrases"]
Need = Literal["modifiers", "affinity"]
Update = Literal["latents", "velocity"]

OF_STEPS = 50
"""The steps of the trajectory that papers count in."""

PLUGINS = "aae_batch.methods"
"""Entry points of this group are modules that register methods."""


@dataclass(frozen=True)
class Steering:
    """When an objective guides, and how far. Names follow diffusers'
    `StableDiffusionAttendAndExcitePipeline`; defaults are those of Attend-and-Excite. The steps of
    a method are those of a trajectory of 50 (`for_steps`).

    Attributes:
        max_iter_to_alter: the steps before this one are guided.
        thresholds: step -> value that the objective's `reached` must attain; until then the step
            refines.
        max_refinement_steps: maximum refinement updates at one step.
        scale_factor: the factor of the gradient at the first step.
        scale_range: over all steps the factor is scaled by the square root of a value that goes
            from the first to the last of these two.
        update: what a guided step changes: the latents before it, or for flow matching the velocity
            that it takes. Refinements change the latents.
    """

    max_iter_to_alter: int = 25
    thresholds: Mapping[int, float] = field(default_factory=lambda: {0: 0.05, 10: 0.5, 20: 0.8})
    max_refinement_steps: int = 20
    scale_factor: float = 20.0
    scale_range: tuple[float, float] = (1.0, 0.5)
    update: Update = "latents"

    def for_steps(self, steps: int) -> Steering:
        """Return the same parts of a trajectory of `steps` steps, as few-step models have. Where
        two thresholds meet at a step, it has the higher."""
        if steps == OF_STEPS:
            return self
        thresholds: dict[int, float] = {}
        for step, threshold in self.thresholds.items():
            place = min(step * steps // OF_STEPS, steps - 1)
            thresholds[place] = max(threshold, thresholds.get(place, 0.0))
        altered = -(-self.max_iter_to_alter * steps // OF_STEPS)
        return replace(self, max_iter_to_alter=altered, thresholds=thresholds)


@dataclass(frozen=True)
class NoiseSearch:
    """Optimise the start noise before the first step (InitNO, arXiv 2404.04650, section 3).

    Attributes:
        rounds: maximum rounds; each after the first begins with new noise.
        steps: maximum noises tried in a round, one guided forward each.
        learning_rate: Adam's, for the mean and the logarithm of the variance.
        target: value of the objective's `reached` at which the search ends.
        most_divergence: maximum divergence from the standard normal distribution, mean over
            elements, in nats.
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
        texts: what a sample is denoised with: the prompt; each of its conjuncts separately; the
            prompt with the values of its noun phrases.
        objective: the function whose loss the latents are moved to reduce, or its `"module:name"`;
            None for no guidance.
        steering: when and how far the objective moves the latents.
        start: the search for start noise; None uses noise as drawn.
        needs: what the objective requires: a subject with modifiers, as "red" in "red circle";
            self-attention (`Seen.affinity`).
        least_subjects: minimum number of subjects that a row must name.
        version: distinguishes this method from an earlier one of the same name; a dataset is not
            resumed with another version. Empty for this package's own methods.
    """

    summary: str
    texts: Texts = "whole"
    objective: Objective | str | None = None
    steering: Steering = Steering()
    start: NoiseSearch | None = None
    needs: frozenset[Need] = frozenset()
    least_subjects: int = 0
    version: str = ""

    def __post_init__(self) -> None:
        if self.texts != "whole" and (self.objective is not None or self.needs):
            raise SettingsError(
                f"A method with an objective must denoise under the whole prompt; its texts are {self.texts!r}."
            )

    @property
    def is_guided(self) -> bool:
        return self.objective is not None

    def load_objective(self) -> Objective | None:
        """Return the objective, imported if necessary; None without guidance."""
        if isinstance(self.objective, str):
            return pkgutil.resolve_name(self.objective)
        return self.objective


def _own(name: str) -> str:
    """Return the `"module:name"` of an objective of this package, whose function is named like
    its module."""
    return f"aae_batch.sampling.objectives.{name}:{name}"


BASELINE = "stable-diffusion"
"""Plain sampling, the baseline of comparisons."""

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
"""Methods by the names that manifests use, in the order of a comparison: the baselines of
Attend-and-Excite's paper, Attend-and-Excite, and later methods."""


def register_method(name: str, method: Method) -> None:
    """Register your own method, so that manifests and settings can name it.

    Raises:
        SettingsError: the name is taken, or cannot be used as a column value and file name.
    """
    if not name or not name.replace("-", "").replace("_", "").isalnum():
        raise SettingsError(f"A method cannot be called {name!r}; use letters, digits and '-'.")
    if METHODS.setdefault(name, method) != method:
        raise SettingsError(f"Method {name!r} already exists; register yours under another name.")


def load_plugins(modules: Sequence[str]) -> dict[str, str]:
    """Import modules that register methods, and those of installed packages' entry points. Modules
    are also searched for in the current folder.

    Returns:
        The methods that are not from this package, each with its version, or else a digest of the
        source of its objective's module.

    Raises:
        SettingsError: a module does not exist or cannot be imported.
    """
    for module in (*modules, *(found.value for found in entry_points(group=PLUGINS))):
        _import(module)
    foreign = {name: method for name, method in METHODS.items() if name not in _OWN_METHODS}
    return {name: _version(name, method) for name, method in foreign.items()}


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


def _version(name: str, method: Method) -> str:
    try:
        objective = method.load_objective()
        if method.version:
            return method.version
        while isinstance(objective, partial):
            objective = objective.func
        source = inspect.getsource(sys.modules[objective.__module__]) if objective else ""
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"The objective of method {name} cannot be found: {error}.") from error
    except (OSError, TypeError, KeyError):
        raise SettingsError(
            f"The source of method {name} cannot be read, so that a change of it would not be noticed: "
            "give Method(..., version=...)."
        ) from None
    return hashlib.sha256(source.encode()).hexdigest()[:16]


_OWN_METHODS = frozenset(METHODS)
