"""How captions are searched for: the options, their checks, and how callers override a bundle's defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from rsedge.errors import OptionError

if TYPE_CHECKING:
    from rsedge.manifest import GenerationDefaults


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingOptions:
    """What to generate; each option means what it means to ``transformers.generate``.

    Attributes:
        num_beams: Hypotheses kept per image; 1 is greedy search, or sampling with ``do_sample``.
        max_new_tokens, min_new_tokens: Tokens generated, the end token included and the start token not.
        length_penalty: Exponent of the length a beam's score is divided by.
        early_stopping: ``True`` ends when ``num_beams`` captions are complete, ``False`` when a better one is
            unlikely, ``"never"`` when none can come.
        repetition_penalty: Above 1 makes tokens already present less likely; 1 does nothing.
        no_repeat_ngram_size: No n-gram of this size occurs twice; 0 does nothing.
        do_sample: Draw each token from the filtered distribution instead of searching.
        temperature, top_k, top_p: The filter, applied in this order; ``top_k`` 0 and ``top_p`` 1 keep every token.
        seed: Of the draws. A draw depends on the seed, the image's key and the position in its caption alone.
    """

    num_beams: int = 1
    max_new_tokens: int = 20
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}, expected {expected}"
            for name, holds, expected in (
                ("num_beams", 1 <= self.num_beams <= 64, "1 (greedy) to 64"),
                ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
                (
                    "min_new_tokens",
                    0 <= self.min_new_tokens <= self.max_new_tokens,
                    f"0 to max_new_tokens ({self.max_new_tokens})",
                ),
                ("early_stopping", self.early_stopping in (True, False, "never"), "True, False or 'never'"),
                ("repetition_penalty", self.repetition_penalty > 0, "a number above 0"),
                ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (off) or more"),
                ("temperature", self.temperature > 0, "a number above 0"),
                ("top_k", self.top_k >= 0, "0 (off) or more"),
                ("top_p", 0 < self.top_p <= 1, "a share above 0 and at most 1"),
                ("seed", 0 <= self.seed < 2**64, "0 to 2**64 - 1"),
            )
            if not holds
        ]
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
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise OptionError(f"unknown decoding option {', '.join(unknown)}; there are: {', '.join(known)}")
        values = asdict(defaults)
        sampling = bool({"temperature", "top_k", "top_p"} & set(given))
        if sampling and not given.get("do_sample", True):
            raise OptionError("do_sample=False contradicts temperature, top_k or top_p: leave one side out")
        if given.get("do_sample") or sampling:
            values.update(num_beams=1, do_sample=True)
        elif "num_beams" in given or "do_sample" in given:
            values.update(do_sample=False, temperature=1.0, top_k=0, top_p=1.0)
        if (values | given)["num_beams"] == 1:
            values.update(length_penalty=1.0, early_stopping=False)
        if "max_new_tokens" in given and "min_new_tokens" not in given:
            values["min_new_tokens"] = min(values["min_new_tokens"], given["max_new_tokens"])
        return replace(cls(**values), **given)


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
