"""One call from a model and a recipe to a whole checkpoint: what `srd quantize` and `srd demo` do."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srd_modifier._extras import require
from srd_modifier.calibration import SELF, as_dataset, from_file, from_model
from srd_modifier.checkpoint.atomic import new_directory, refuse_existing
from srd_modifier.errors import RecipeError, SRDError

if TYPE_CHECKING:
    from llmcompressor.recipe import Recipe


# what AWQModifier of llm-compressor 0.14.0.1 ends in on a machine with a CPU only
_NO_ACCELERATOR = "Cannot access accelerator device when none is available"


def quantize(
    model_name: str,
    recipe_path: Path,
    output: Path,
    *,
    dataset: str | Sequence[Sequence[int]] | None = None,
    num_samples: int = 512,
    max_seq_length: int = 512,
    seed: int = 0,
    overwrite: bool = False,
    pipeline: str = "independent",
) -> None:
    """Run a recipe through llm-compressor's `oneshot` and save model, sidecar and tokenizer in one step.

    Args:
        model_name: a directory or hub id.
        recipe_path: a YAML recipe.
        output: the directory to make; it appears when everything is written, or not at all.
        dataset: a text or JSON file, `self` for samples that the model writes, a data set that llm-compressor knows by
            name, or samples as token ids, which are taken as they are; None for recipes that need no data.
        num_samples: calibration samples.
        max_seq_length: tokens per sample.
        seed: of everything random: sampling, the choice of samples, shuffling.
        overwrite: replace an existing model directory.
        pipeline: of llm-compressor: independent, sequential, basic or datafree.

    Raises:
        SRDError: recipe, model, data or output are at fault.
    """
    require("llmcompressor", extra="quantize")
    refuse_existing(output, overwrite=overwrite)
    recipe = load_recipe(recipe_path)
    _check_data(recipe_path, recipe, dataset)

    import transformers

    transformers.set_seed(seed)
    model, tokenizer = _load(model_name)
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    for modifier in _srd_modifiers(recipe):
        modifier.spool_dir = modifier.spool_dir or str(output.parent)
        # data that was given is used, if only for importance.safetensors
        modifier.requires_calibration_data |= dataset is not None and modifier.quantizes_itself
    kwargs: dict[str, Any] = {}
    if dataset is not None and not isinstance(dataset, str):
        num_samples, max_seq_length = len(dataset), max(map(len, dataset), default=0)
    if dataset is not None:
        kwargs |= {"num_calibration_samples": num_samples, "max_seq_length": max_seq_length}
        kwargs["dataset"] = _calibration(
            dataset, model, tokenizer, num_samples=num_samples, max_seq_length=max_seq_length, seed=seed
        )
        kwargs["shuffle_calibration_samples"] = False  # the order is ours, and the same every time
    try:
        _oneshot(recipe_path, model=model, tokenizer=tokenizer, recipe=recipe, pipeline=pipeline, **kwargs)
        with new_directory(output, overwrite=overwrite) as staging:
            model.save_pretrained(str(staging), save_compressed=True)
            tokenizer.save_pretrained(str(staging))
    finally:
        for modifier in _srd_modifiers(recipe):
            modifier.close()


def load_recipe(path: Path) -> "Recipe":
    """Parse a YAML recipe.

    Raises:
        RecipeError: the file is missing, not a recipe, names an unknown modifier, or has a setting out of range.
    """
    import yaml
    from llmcompressor.recipe import Recipe
    from pydantic import ValidationError

    if not path.is_file():
        raise RecipeError(f"{path}: there is no such recipe")
    try:
        if path.suffix.lower() != ".md":  # a model card has its recipe between the lines
            _check_layout(path, yaml.safe_load(path.read_text(encoding="utf-8")))
        recipe = Recipe.create_instance(str(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = str(first["msg"]).removeprefix("Value error, ")
        raise RecipeError(f"{path}: {error.title}{f'.{where}' if where else ''}: {reason}") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise RecipeError(f"{path} is not a recipe: {' '.join(str(error).split())}") from error
    if not recipe.modifiers:
        # llm-compressor itself would run nothing and say nothing
        raise RecipeError(f"{path} has no modifiers: its keys must end in _stage and, below, in _modifiers")
    return recipe


def _check_layout(path: Path, content: Any) -> None:
    """Refuse what llm-compressor would stumble over without saying where."""
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise RecipeError(f"{path} is not a recipe: it is {found}, expected a mapping of stages")
    for stage in content.values():
        for group_name, group in stage.items() if isinstance(stage, dict) else ():
            if str(group_name).endswith("_modifiers") and isinstance(group, dict):
                for name, settings in group.items():
                    if not isinstance(settings, dict):
                        raise RecipeError(f"{path}: {name} has no settings; write {name}: {{}} for its defaults")


def _oneshot(recipe_path: Path, **kwargs: Any) -> None:
    from llmcompressor import oneshot

    try:
        oneshot(**kwargs)
    except ValueError as error:
        if isinstance(error, SRDError):
            raise
        # llm-compressor's own way to refuse a recipe, at length
        raise RecipeError(f"{recipe_path}: llm-compressor refuses it: {' '.join(str(error).split())}") from error
    except RuntimeError as error:
        if _NO_ACCELERATOR not in str(error):
            raise
        raise RecipeError(
            f"{recipe_path}: this llm-compressor runs AWQ only on a machine with an accelerator; "
            "docs/upstream.md says why, and how to run it without one"
        ) from error


def _check_data(path: Path, recipe: "Recipe", dataset: str | Sequence[Sequence[int]] | None) -> None:
    needing = [type(m).__name__ for m in recipe.modifiers if m.requires_calibration_data]
    if needing and dataset is None:
        raise SRDError(f"{path}: {needing[0]} needs calibration data; give --dataset a text file, or --dataset self")


def _srd_modifiers(recipe: "Recipe") -> list[Any]:
    from srd_modifier.modifier import SRDModifier

    return [modifier for modifier in recipe.modifiers if isinstance(modifier, SRDModifier)]


def _load(model_name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if Path(model_name).exists() and not (Path(model_name) / "config.json").is_file():
        raise SRDError(f"{model_name} has no config.json: this is not a model directory")
    try:
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(model_name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SRDError(f"cannot load {model_name}: {reason}") from error
    if getattr(model.config, "quantization_config", None) is not None:
        raise SRDError(f"{model_name} is quantized already; start from the original model")
    return model, tokenizer


def _calibration(dataset: str | Sequence[Sequence[int]], model: Any, tokenizer: Any, **settings: int) -> Any:
    if not isinstance(dataset, str):
        if not dataset or min(map(len, dataset)) < 2:
            raise SRDError("there is no text to calibrate on: samples are of two token ids or more")
        return as_dataset([list(sample) for sample in dataset])
    if dataset == SELF:
        return as_dataset(from_model(model, tokenizer, **settings))
    if Path(dataset).suffix or Path(dataset).exists():
        return as_dataset(from_file(Path(dataset), tokenizer, **settings))
    from llmcompressor.transformers.data import TextGenerationDataset

    known = {*TextGenerationDataset.registered_names(), *TextGenerationDataset.registered_aliases()}
    if dataset.lower().replace("_", "-") not in known:
        raise SRDError(
            f"{dataset} is neither a file nor a data set that llm-compressor knows: {', '.join(sorted(known))}"
        )
    return dataset
