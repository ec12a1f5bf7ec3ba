"""
What an audit tries against a protection beside its own purification: a countermeasure by name, alone or joined with
that purification, such as `impulse-filter+purified+corruption`. With `pretrained` or `pretrained-upper` among the
names, victims start from a network that SimCLR has trained on the collected images.
"""

from dataclasses import dataclass, replace

from .. import countermeasures
from ..countermeasures import Countermeasure
from ..countermeasures.purifiers import purifying
from ..pipeline_jcdp import JointConditionalPurificationPipeline
from ..purification_config import PurificationConfig
from ..train.default_purifier import SMOKE_PURIFICATION


# What an attack calls the audit's own purification. In front of others, they are made on the purified images; behind
# others, images go through those first and are then purified in the same way.
PURIFIED = "purified"
# Names of a victim's start, and what of it is fine-tuned.
PRETRAINED = {"pretrained": "all", "pretrained-upper": "upper"}


_TUNED = {"all": "all weights", "upper": "the upper stages"}


@dataclass(frozen=True)
class Attack:
    """
    One row of an audit.

    Args:
        name (`str`): What the row is called.
        countermeasure (`Countermeasure`): What is done to the images that it takes, and while training.
        finetune (`str`, *optional*): What is fine-tuned of a pretrained network; None for random weights.
    """

    name: str
    countermeasure: Countermeasure
    finetune: str | None = None

    @property
    def takes_purified(self) -> bool:
        """Whether it takes the images as the audit has purified them, and not as they are protected."""
        return self.name.startswith(f"{PURIFIED}+")

    @property
    def purifies_as_the_audit(self) -> bool:
        """Whether it purifies images of its own, with the settings of the audit."""
        return PURIFIED in self.name.split("+")[1:]

    def check(self, pipe: JointConditionalPurificationPipeline) -> None:
        """
        Check that a purifier can do what the attack asks for with settings of its own.

        Raises:
            ValueError: If it cannot, in one sentence.
        """
        if not self.purifies_as_the_audit:
            for part in self.countermeasure.parts or (self.countermeasure,):
                if part.needs_purifier:
                    pipe.resolve_config(PurificationConfig(**part.settings))

    def as_done(self, config: PurificationConfig, *, smoke: bool) -> Countermeasure:
        """For a report: the countermeasure, with the settings that purification had in it; `config` is the audit's."""
        if self.finetune is not None:
            images = replace(self, finetune=None).as_done(config, smoke=smoke)
            return replace(
                images,
                name=self.name,
                source=f"SimCLR on the collected images, then fine-tuning of {_TUNED[self.finetune]}; {images.source}",
                cost=f"one training without labels for all rows that start from it; {images.cost}",
                settings=dict(images.settings) | {"finetune": self.finetune},
            )
        if not self.countermeasure.needs_purifier or not (smoke or self.purifies_as_the_audit):
            return self.countermeasure

        def done(part: Countermeasure) -> Countermeasure:
            if not part.needs_purifier:
                return part
            if self.purifies_as_the_audit:
                return purifying(PURIFIED, "this audit's purification", config)
            return purifying(part.name, part.source, config)

        return countermeasures.join(
            self.name, [done(part) for part in self.countermeasure.parts or (self.countermeasure,)]
        )


def attack(name: str, *, smoke: bool = False) -> Attack:
    """
    An attack by its name; of a smoke run, with countermeasures of seconds.

    Raises:
        ValueError: If it is no countermeasure, names the audit's purification alone, or purifies twice.
    """
    names = name.split("+")
    starts = [part for part in names if part in PRETRAINED]
    if len(starts) > 1:
        raise ValueError(f"attacks has {name!r}, but a victim has one start: name one of them.")
    if starts:
        others = "+".join(part for part in names if part not in starts) or "none"
        images = Attack(others, countermeasures.get("none")) if others == PURIFIED else attack(others, smoke=smoke)
        # A start has no place in the order of what is done to images, so it comes last.
        whole = starts[0] if others == "none" else f"{others}+{starts[0]}"
        return replace(images, name=whole, finetune=PRETRAINED[starts[0]])
    if PURIFIED not in names:
        return Attack(name, countermeasures.get(name, smoke=smoke))
    others = countermeasures.get("+".join(part for part in names if part != PURIFIED) or "none", smoke=smoke)
    if names.count(PURIFIED) > 1 or others.needs_purifier:
        raise ValueError(f"attacks has {name!r}, but images are purified once: name what comes beside it.")
    if name == PURIFIED:
        raise ValueError(f"attacks has {name!r}, but that is a row of every audit: name what comes beside it.")
    if names[0] == PURIFIED:
        return Attack(name, others)
    whole = "+".join("unconditional" if part == PURIFIED else part for part in names)
    return Attack(name, countermeasures.get(whole, smoke=smoke))


def in_seconds(config: PurificationConfig) -> PurificationConfig:
    """The same purification with as few steps as a smoke run has time for."""
    return replace(
        config,
        diffusion_steps=min(SMOKE_PURIFICATION.diffusion_steps, config.diffusion_steps),
        num_inference_steps=min(SMOKE_PURIFICATION.num_inference_steps, *config.evaluations_per_round),
        num_rounds=1,
    )
