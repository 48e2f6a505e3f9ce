"""The front matter of a card, through huggingface_hub's own classes. What is not known is left out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srd_modifier.errors import CheckpointError, ConfigError
from srd_modifier.evaluation.card.contents import Contents, Kind
from srd_modifier.evaluation.card.measured import Measured
from srd_modifier.evaluation.results import TaskInfo
from srd_modifier.evaluation.table import METRIC_NAMES, shown_metrics

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_TASK = ("text-generation", "Text Generation")

# names that the hub has for metrics; the harness's others are used as they are
_METRIC_TYPES = {"ppl": "perplexity", "kld_mean": "kl_divergence", "acc": "accuracy"}

# what a card says about a model that stays true when its weights are quantized
_KEPT = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Identity:
    """What the files of a model do not say about it.

    Attributes:
        base_model: hub id of the original.
        quantized_by: who made it, a user or an organization of the hub.
        repo_id: hub id that it is or will be published under.
        license: identifier of the hub, such as apache-2.0.

    Raises:
        ConfigError: one of them is not what the hub takes.
    """

    base_model: str | None = None
    quantized_by: str | None = None
    repo_id: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        for option, hub_id in (("--base-model", self.base_model), ("--repo-id", self.repo_id)):
            if hub_id is not None:
                _check_hub_id(option, hub_id)
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise ConfigError(
                f"--license is {self.license!r}, expected an identifier of the hub such as apache-2.0, mit or other"
            )
        if self.quantized_by is not None and (not self.quantized_by.strip() or "\n" in self.quantized_by):
            raise ConfigError(f"--quantized-by is {self.quantized_by!r}, expected a name")

    def title(self, contents: Contents) -> str:
        """What the card calls the model."""
        return contents.name if self.repo_id is None else self.repo_id.rpartition("/")[2]


def _check_hub_id(option: str, hub_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise ConfigError(f"{option} is {hub_id!r}, expected a hub id such as organization/model") from error


def inherited(contents: Contents, identity: Identity) -> dict[str, Any]:
    """What earlier cards say: the directory's own first, then that of the original, if it is on this machine.

    Nothing is fetched.

    Raises:
        CheckpointError: the front matter of one of them cannot be read.
    """
    own = _front_matter(contents.directory / "README.md")
    known = {name: own[name] for name in ("base_model", "quantized_by") if isinstance(own.get(name), str)}
    base_model = identity.base_model or known.get("base_model")
    theirs = _front_matter(card) if (card := _card_of(base_model)) is not None else {}
    # a name of a licence belongs to the licence beside it
    source = next((values for values in (own, theirs) if values.get("license")), {})
    known |= {name: source[name] for name in _KEPT if name != "language" and source.get(name)}
    language = own.get("language") or theirs.get("language")
    return known | ({"language": language} if language else {})


def _card_of(base_model: str | None) -> Path | None:
    """The original's card, as a directory or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if base_model is None:
        return None
    if Path(base_model).is_dir():
        return Path(base_model) / "README.md"
    found = try_to_load_from_cache(base_model, "README.md")
    return Path(found) if isinstance(found, str) else None


def _front_matter(path: Path) -> dict[str, Any]:
    """Of a card; empty where there is none."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    if not path.is_file():
        return {}
    try:
        return metadata_load(path) or {}
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: its front matter cannot be read: {' '.join(str(error).split())}") from error


def card_data(
    contents: Contents, identity: Identity, measured: Measured | None, known: dict[str, Any]
) -> "ModelCardData":
    """The front matter.

    Args:
        contents: of the directory.
        identity: what was said about it.
        measured: rows of a comparison that belong to it.
        known: what `inherited` found.
    """
    from huggingface_hub import ModelCardData

    base_model = identity.base_model or known.get("base_model")
    quantized_by = identity.quantized_by or known.get("quantized_by")
    results = [] if measured is None else eval_results(measured)
    licensing = {"license": identity.license} if identity.license else {n: known[n] for n in _KEPT[:3] if n in known}
    more: dict[str, Any] = {}
    if base_model and contents.is_quantized:
        more["base_model_relation"] = "quantized"
    if quantized_by and (contents.is_quantized or contents.gguf):
        more["quantized_by"] = quantized_by
    return ModelCardData(
        base_model=base_model,
        language=known.get("language"),
        library_name=None if contents.kind is Kind.NONE else "transformers",
        pipeline_tag=_TASK[0] if _is_causal(contents) else None,
        tags=_tags(contents) or None,
        model_name=identity.title(contents) if results else None,
        eval_results=results or None,
        **licensing,
        **more,
    )


def eval_results(measured: Measured) -> "list[EvalResult]":
    """The scores of the directory's own rows, for the hub's model index; of every task those that the table shows."""
    from huggingface_hub import EvalResult

    results = measured.results
    found = []
    for model in measured.own:
        for name, metric in shown_metrics(results):
            score = model.score(name, metric)
            if score is None:
                continue
            task = results.task(name)
            dataset, config = _dataset(task)
            shown = METRIC_NAMES.get(metric, metric)
            # the index has one entry for each data set: what would differ in one entry is part of the metric's name
            alike = [other.title for other in results.tasks if _dataset(other) == (dataset, config)]
            parts = [shown] + [task.title] * (len(alike) > 1) + [model.label] * (len(measured.own) > 1)
            found.append(
                EvalResult(
                    task_type=_TASK[0],
                    task_name=_TASK[1],
                    dataset_type=dataset,
                    dataset_name=", ".join(alike),
                    dataset_config=config,
                    metric_type=_METRIC_TYPES.get(metric, metric),
                    metric_name=", ".join(parts),
                    metric_value=score.value,
                )
            )
    return found


def _dataset(task: TaskInfo) -> tuple[str, str | None]:
    """Hub id and configuration of a task's data; of local data the task's name, as a path says nothing to others.

    The harness's sources are `organization/name/configuration`; files are a path, or a folder, a colon and names.
    """
    parts = task.source.split("/")
    if ":" in task.source or len(parts) > 3 or not all(parts) or "." in parts[-1] or Path(task.source).exists():
        return task.name, None
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else None


def _is_causal(contents: Contents) -> bool:
    names: Sequence[Any] = contents.config.get("architectures") or ()
    return contents.kind is Kind.NONE or any(str(name).endswith("ForCausalLM") for name in names)


def _tags(contents: Contents) -> list[str]:
    tags = {
        Kind.SRD: ["srd", "compressed-tensors", "w4a16"],
        Kind.W4A16: ["compressed-tensors", "w4a16"],
        Kind.DENSE: [],
        Kind.NONE: [],
    }[contents.kind]
    return [*tags, *(["llm-compressor"] if contents.modifiers else []), *(["gguf"] if contents.gguf else [])]
