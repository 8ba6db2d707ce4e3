"""The recipe: every setting of a run, its type, its range, its default and what it is for.

Unknown keys are refused, types are strict (text is not a number, true is not 1), and settings that
cannot work together are refused with the reason (combinations.py). Settings that only one of the
stages or methods knows have no effect elsewhere and are refused there, not ignored.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from finetune.recipe.combinations import METHOD_KEYS, Problem
from finetune.recipe.combinations import find as find_problems
from finetune.recipe.section import Section, Text
from finetune.recipe.train_section import Train
from finetune.recipe.yaml_text import dump_yaml
from finetune.stage_table import STAGES

DataFormat = Literal["auto", "sharegpt", "messages", "alpaca", "prompt_response", "text"]

_TOOLKIT_ROOT = Path(__file__).resolve().parents[2]


class Model(Section):
    """Which base, from where, and in what precision it is held."""

    base: Text = Field(
        description="catalogue name (baichuan2-7b-chat, baichuan2-nano), local folder or hub id"
    )
    revision: str | None = Field(
        default=None, description="branch, tag or commit on the hub; null is the default branch"
    )
    source: Literal["huggingface", "modelscope"] = Field(
        default="huggingface", description="hub that hub ids and catalogue names are downloaded from"
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        default="none",
        description="hold the frozen base in 8 bits (LLM.int8) or 4 bits (nf4, doubly quantised: QLoRA)",
    )
    embeddings: Literal["full", "int8"] = Field(
        default="full",
        description="hold embeddings and head in 8 bits too, beside a quantised base: 1 GiB less of a 7B model",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="precision of unquantised weights and of computation"
    )
    attention: Literal[
        "auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = Field(
        default="auto",
        description="attention implementation; auto is the best one here that passes a self-test",
    )


class Adapter(Section):
    """The trainable part. Each method has its own keys (METHOD_KEYS)."""

    choices: ClassVar = {"method": METHOD_KEYS}

    method: Literal["lora", "ptuning", "prefix"] = Field(default="lora", description="kind of adapter")

    rank: int = Field(
        default=64, gt=0, description="lora: rank of the update, more learns more and costs memory"
    )
    alpha: float = Field(default=16.0, gt=0, description="lora: the update is scaled by alpha/rank")
    dropout: float = Field(
        default=0.05, ge=0, lt=1, description="lora: dropout on the adapter's input, 0 to below 1"
    )
    targets: str | list[Text] = Field(
        default="all-linear",
        description="lora: all-linear, or a list of module names such as [W_pack, o_proj]",
    )
    rslora: bool = Field(default=False, description="lora: scale by alpha/sqrt(rank), steadier at high rank")
    dora: bool = Field(
        default=False, description="lora: weight-decomposed LoRA (DoRA): better at low rank, slower"
    )
    init: str = Field(
        default="default",
        description="lora: default, gaussian, orthogonal, olora, pissa, pissa_niter_N (fast PiSSA) or loftq",
    )

    num_virtual_tokens: int = Field(
        default=20, gt=0, description="ptuning, prefix: number of trained vectors in front"
    )
    encoder: Literal["mlp", "lstm", "none"] = Field(
        default="mlp", description="ptuning: network that produces the vectors; none trains them directly"
    )
    encoder_hidden_size: int | None = Field(
        default=None,
        gt=0,
        description="ptuning, prefix with prefix_projection: width of that network; null is the model's",
    )
    encoder_layers: int = Field(default=2, gt=0, description="ptuning with encoder lstm: its layers")
    encoder_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="ptuning with encoder lstm: its dropout"
    )
    prefix_projection: bool = Field(
        default=False, description="prefix: produce the prefix by a small network"
    )

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: str | list[str]) -> str | list[str]:
        if targets != "all-linear" and (isinstance(targets, str) or not targets):
            raise ValueError(f"expected all-linear or a list such as [W_pack, o_proj], found {targets!r}")
        return targets

    @field_validator("init")
    @classmethod
    def _check_init(cls, init: str) -> str:
        names = ("default", "gaussian", "orthogonal", "olora", "pissa", "loftq")
        if init not in names and not re.fullmatch(r"pissa_niter_\d+", init):
            raise ValueError(
                f"expected one of {', '.join(names)} or pissa_niter_N, N iterations, found {init!r}"
            )
        return init


class Source(Section):
    """One data file (or hub data set) of several."""

    path: Text = Field(description="file, folder, pattern, or hub:OWNER/NAME[:SPLIT]")
    weight: float = Field(
        default=1.0, gt=0, description="how often each of its rows is seen in an epoch; 0.5 is a fixed half"
    )
    format: DataFormat | None = Field(default=None, description="format of this source; null is data.format")


def path_or_section(value: Any) -> str | None:
    """Which of the two tags an entry has, for pydantic; None if it is neither."""
    if isinstance(value, str):
        return "<path>"
    return "<section>" if isinstance(value, (dict, Section)) else None


def path_or_list(value: Any) -> str | None:
    """As `path_or_section`, for a setting that may be a list of entries."""
    if isinstance(value, str):
        return "<path>"
    return "<list>" if isinstance(value, list) else None


_OneSource = Annotated[
    Annotated[Text, Tag("<path>")] | Annotated[Source, Tag("<section>")],
    Discriminator(
        path_or_section,
        custom_error_type="source",
        custom_error_message="expected a path or {path: ..., weight: ..., format: ...}",
    ),
]
Sources = Annotated[
    Annotated[Text, Tag("<path>")]
    | Annotated[Annotated[list[_OneSource], Field(min_length=1)], Tag("<list>")],
    Discriminator(
        path_or_list,
        custom_error_type="sources",
        custom_error_message="expected a path or a list of paths and {path: ..., weight: ...} entries",
    ),
]


class Sampling(Section):
    """A sample of the training rows, balanced over what they ask and free of near-duplicates."""

    choices: ClassVar = {"method": {"quota": (), "temperature": ("temperature",)}}

    size: int = Field(gt=0, description="training rows to take; fewer where fewer differ")
    method: Literal["quota", "temperature"] = Field(
        default="quota",
        description="quota: the same share for each secondary category; temperature: in proportion to its rows "
        "to the power of temperature",
    )
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="method temperature: 0 is the same for all, 1 leaves the mix as it is; null is 0.3",
    )
    categories: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None,
        description="take these alone: ids of any tier of the prompt taxonomy, or unknown; null is all",
    )
    column: Text | None = Field(
        default=None, description="column with the id of each row's category; null classifies the prompts"
    )
    overlays: list[Text] = Field(default=[], description="YAML files that extend the prompt taxonomy")


class Data(Section):
    """What to learn from and how it is cut into examples."""

    train: Sources = Field(
        description="training data: a path or hub id, or a list of them, with weights if wished"
    )
    validation: Sources | None = Field(default=None, description="held-out data, as in train; null is none")
    validation_share: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="share of the training data to hold out, in place of validation",
    )
    format: DataFormat = Field(
        default="auto", description="layout of the rows; auto recognises it and says which"
    )
    max_length: int = Field(
        default=2048, ge=16, description="tokens of an example (or pack); what is longer is cut on the right"
    )
    packing: bool = Field(
        default=True,
        description="join short examples into full rows, each seeing only itself (without lora: false)",
    )
    on_bad_rows: Literal["stop", "skip"] = Field(
        default="stop", description="stop at rows that cannot be used, or leave them out"
    )
    system: str | None = Field(default=None, description="system message for conversations that bring none")
    max_rows: int | None = Field(
        default=None, gt=0, description="use only the first rows of each source; null is all"
    )
    sampling: Sampling | None = Field(
        default=None,
        description="train on a sample balanced over the prompt taxonomy: {size: ..., method: ...}; null is all",
    )
    workers: int | None = Field(
        default=None, gt=0, description="processes that tokenise; null is one per core"
    )

    def train_sources(self) -> list[Source]:
        """The training data as a list, formats and weights filled in."""
        return self._as_list(self.train)

    def validation_sources(self) -> list[Source]:
        """The held-out data as a list, empty where there is none."""
        return self._as_list(self.validation) if self.validation is not None else []

    def _as_list(self, sources: str | list[str | Source]) -> list[Source]:
        entries = [sources] if isinstance(sources, str) else sources
        full = [Source(path=entry) if isinstance(entry, str) else entry for entry in entries]
        return [entry.model_copy(update={"format": entry.format or self.format}) for entry in full]


class Report(Section):
    """What report.html shows of the answers."""

    samples: int = Field(default=8, ge=0, description="held-out prompts answered before and after training")
    max_new_tokens: int = Field(default=256, ge=1, description="longest answer among the samples, in tokens")


class Step(Section):
    """Anything that a file can have done: `stage` says what, the sections of a derived class with what."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[^/\\\x00]+$")] = Field(
        description="name of the run; the recipe's file name where not given"
    )
    stage: str = Field(description="what to do: " + ", ".join(STAGES))
    seed: int = Field(default=42, ge=0, lt=2**32, description="seed of everything random")
    output_dir: str = Field(default="", description="folder to write; runs/NAME where not given")

    unread: ClassVar[frozenset[str]] = frozenset()
    """Dotted keys that the class inherits and its stage has no use for."""

    changeable: ClassVar[frozenset[str]] = frozenset()
    """Dotted keys, beside those of every stage, that a run may be resumed with other values of."""

    _file: Path | None = PrivateAttr(None)

    @field_validator("stage")
    @classmethod
    def _check_stage(cls, stage: str) -> str:
        if stage not in STAGES:
            raise ValueError(f"expected one of {', '.join(STAGES)}, found {stage!r}")
        return stage

    @model_validator(mode="after")
    def _complete(self) -> Step:
        """Fill in defaults that depend on other settings; refuse what cannot work together."""
        self.output_dir = self.output_dir or f"runs/{self.name}"
        self.fill_in()
        problems = self.problems()
        if problems:
            text = "; ".join(f"{key}: {reason}" for key, reason in problems)
            raise PydanticCustomError("combination", "{text}", {"text": text, "problems": problems})
        return self

    def fill_in(self) -> None:
        """Set defaults that depend on other settings."""

    def problems(self) -> list[Problem]:
        """Settings that cannot work together, each with its key, the reason and the remedy."""
        return []

    def held_to(self) -> list[str]:
        """What the results will be held to, in sentences for `check`."""
        return []

    def input_files(self) -> list[str]:
        """The data files that are read, as the recipe names them: a step is done again where one has changed."""
        return []

    def user_functions(self) -> list[tuple[str, str]]:
        """The functions of the user's that are called, as (key, ``package.module:function``)."""
        return []

    @property
    def file(self) -> Path | None:
        """The file that the recipe was read from; None for one made in Python."""
        return self._file

    def resolve(self, path: str) -> str:
        """Where a path of the recipe points on this machine.

        A relative path counts from the current directory; if nothing is there, from the folder above
        the recipe's own (the repository of `recipes/x.yaml`), then from the toolkit's checkout, so
        that recipes run from anywhere. What is nowhere, for example a hub id, comes back unchanged.
        """
        plain = Path(path).expanduser()
        roots = [Path(), *([self._file.resolve().parent.parent] if self._file else []), _TOOLKIT_ROOT]
        return next((str(root / plain) for root in roots if (root / plain).exists()), path)

    def settings(self) -> dict[str, Any]:
        """All settings in schema order, defaults filled in."""
        settings = self.model_dump()
        settings["output_dir"] = settings.pop("output_dir")  # behind the sections
        return settings

    def dump(self) -> str:
        """The effective recipe as YAML: running it repeats the run; paths stand as they were given."""
        return dump_yaml(self.settings())


class Recipe(Step):
    """A run that trains.

    A stage may have a class of its own, derived from this one, with further sections and keys (`STAGES`).
    """

    model: Model
    adapter: Adapter = Field(default_factory=Adapter)
    data: Data
    train: Train = Field(default_factory=Train)
    report: Report = Field(default_factory=Report)

    def fill_in(self) -> None:
        """Prompt vectors stand in front of one document, and a prefix lives in the key/value cache."""
        if self.adapter.method != "lora" and "packing" not in self.data.model_fields_set:
            self.data.packing = False
        if self.adapter.method == "prefix" and "gradient_checkpointing" not in self.train.model_fields_set:
            self.train.gradient_checkpointing = False

    def problems(self) -> list[Problem]:
        """Settings that cannot work together; a stage with a recipe class of its own adds what it cannot do."""
        return find_problems(self)

    def input_files(self) -> list[str]:
        """Training and held-out data, and what extends the taxonomy that training data is sampled by."""
        overlays = self.data.sampling.overlays if self.data.sampling else []
        sources = [*self.data.train_sources(), *self.data.validation_sources()]
        return [*(source.path for source in sources), *overlays]

    def settings(self) -> dict[str, Any]:
        """All settings; keys that the adapter's method does not read are left out."""
        settings = super().settings()
        keys = ("method", *METHOD_KEYS[self.adapter.method])
        settings["adapter"] = {key: value for key, value in settings["adapter"].items() if key in keys}
        return settings
