"""How captions are searched for: the options, their checks, and how callers override a bundle's defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypedDict

from rsedge.errors import OptionError
from rsedge.manifest import GenerationDefaults

# Settings of transformers' searches that CLIPCap's, which averages over the length, has no counterpart of.
_NOT_AVERAGED = ("min_new_tokens", "length_penalty", "early_stopping", "repetition_penalty", "no_repeat_ngram_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingOptions(GenerationDefaults):
    """What to generate: the settings of :class:`~rsedge.manifest.GenerationDefaults`, settled, and a seed."""

    max_new_tokens: int = 20
    seed: int = 0
    """Of the draws. A draw depends on the seed, the image's key and the position in its caption alone."""

    def __post_init__(self) -> None:
        problems = self.problems()
        if not 0 <= self.seed < 2**64:
            problems.append(f"seed is {self.seed}, expected 0 to 2**64 - 1")
        if self.do_sample and self.num_beams > 1:
            problems.append(
                f"sampling and beam search were both asked for (num_beams {self.num_beams}): choose beams, "
                "or top-p, top-k and temperature"
            )
        # What would change nothing is refused rather than ignored.
        if not self.do_sample and (self.temperature, self.top_k, self.top_p, self.seed) != (1.0, 0, 1.0, 0):
            problems.append(
                "temperature, top_k, top_p and seed only act on sampling: add do_sample=True or leave them out"
            )
        if self.num_beams == 1 and (self.length_penalty, self.early_stopping) != (1.0, False):
            problems.append(
                "length_penalty and early_stopping only act on beam search: add num_beams or leave them out"
            )
        if problems:
            raise OptionError("; ".join(problems))

    def averaged_problems(self, vocab_size: int) -> list[str]:
        """What CLIPCap's searches, which have only beams, lengths and draws, cannot honour, as sentences.

        The first step has no more candidates than ``vocab_size``.
        """
        neutral = {entry.name: entry.default for entry in fields(self)}
        problems = [
            f"{name} is {getattr(self, name)!r}, which CLIPCap's search has no counterpart of: leave it out"
            for name in _NOT_AVERAGED
            if getattr(self, name) != neutral[name]
        ]
        if self.num_beams > vocab_size:
            problems.append(f"num_beams is {self.num_beams}, the model has {vocab_size} tokens: ask for at most those")
        return problems

    @classmethod
    def resolve(cls, defaults: GenerationDefaults, overrides: dict[str, Any]) -> DecodingOptions:
        """The bundle's defaults with ``overrides`` over them; None and absent mean the default.

        Naming ``top_p``, ``top_k`` or ``temperature`` asks for sampling, and naming ``num_beams`` asks for search:
        a default of the other kind then gives way.

        Raises:
            OptionError: An unknown name, or a value that is not accepted.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise OptionError(f"unknown decoding option {', '.join(unknown)}; there are: {', '.join(known)}")
        values = asdict(defaults)
        sampling = bool({"temperature", "top_p"} & set(given)) or bool(given.get("top_k"))
        if sampling and not given.get("do_sample", True):
            raise OptionError("do_sample=False contradicts temperature, top_k or top_p: leave one side out")
        if given.get("do_sample") or sampling:
            values.update(num_beams=1, do_sample=True)
        elif "num_beams" in given or "do_sample" in given:
            values.update(do_sample=False, temperature=1.0, top_k=0, top_p=1.0)
        if (values | given)["num_beams"] == 1:
            values.update(length_penalty=1.0, early_stopping=False)
        if "seed" in given and not (values | given)["do_sample"]:
            raise OptionError("seed only acts on sampling: add top_p, top_k or temperature, or leave it out")
        if "max_new_tokens" in given and "min_new_tokens" not in given:
            values["min_new_tokens"] = min(values["min_new_tokens"], given["max_new_tokens"])
        return cls(**(values | given))


class DecodingOverrides(TypedDict, total=False):
    """Keyword arguments that override a bundle's generation defaults; see :class:`DecodingOptions`."""

    num_beams: int | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
