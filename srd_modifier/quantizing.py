"""One call from a model and a recipe to a whole checkpoint: what `srd quantize` and `srd demo` do."""

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srd_modifier._extras import require
from srd_modifier.calibration import SELF, as_dataset, from_file, from_model
from srd_modifier.checkpoint.atomic import new_directory, refuse_existing, write_text
from srd_modifier.checkpoint.base_writer import MAX_FILE
from srd_modifier.checkpoint.locate import find_safetensors
from srd_modifier.distributed import Ranks, launched, own_part
from srd_modifier.errors import RecipeError, SRDError
from srd_modifier.loading import load_tokenizer, loaded_model
from srd_modifier.resuming.suitable import why_not_resumable
from srd_modifier.resuming.task import task_of
from srd_modifier.resuming.workplace import Workplace, is_moved, workplace

if TYPE_CHECKING:
    from llmcompressor.recipe import Recipe

# of the model itself, which take as long to write as they are many
_SAMPLES = "samples.json"

# what AWQModifier of llm-compressor 0.14.0.1 ends in on a machine with a CPU only
_NO_ACCELERATOR = "Cannot access accelerator device when none is available"

# those of llm-compressor that do for round-to-nearest what streaming does
_STREAMED_PIPELINES = ("independent", "datafree")


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
    resume: bool = False,
    pipeline: str = "independent",
    max_memory: int | None = None,
) -> None:
    """Run a recipe through llm-compressor's `oneshot` and save model, sidecar and tokenizer in one step.

    Round-to-nearest without data is streamed instead: one decoder layer is in memory at a time, and every layer is on
    the disk before the next begins, with the same bytes in the end (`srd_modifier.streaming`).

    Where `torchrun` started several processes they divide the work, and the first of them writes.

    Args:
        model_name: a directory or hub id.
        recipe_path: a YAML recipe.
        output: the directory to make; it appears when everything is written, or not at all.
        dataset: a text or JSON file, `self` for samples that the model writes, a data set that llm-compressor knows by
            name, or samples as token ids, which are taken as they are; None for recipes that need no data.
        num_samples: calibration samples.
        max_seq_length: tokens per sample.
        seed: of everything random: sampling, the choice of samples, shuffling.
        overwrite: replace an existing model directory; without `resume`, an unfinished one beside it too.
        resume: go on where a quantization to the same directory was cut off, if one was.
        pipeline: of llm-compressor: independent, sequential, basic or datafree.
        max_memory: bytes that the weights of a model that is not streamed may take; the others stay on the disk. None
            is what is free, less 5 GB.

    Raises:
        SRDError: recipe, model, data or output are at fault, or another process failed.
    """
    require("llmcompressor", extra="quantize")
    output = output.absolute()
    samples = {"num_samples": num_samples, "max_seq_length": max_seq_length, "seed": seed}
    with launched() as ranks, ExitStack() as stack:
        with ranks.together():
            if ranks.first and not (resume and is_moved(output)):
                refuse_existing(output, overwrite=overwrite)
            recipe = load_recipe(recipe_path)
            _check_data(recipe_path, recipe, dataset)
            unsuitable = _why_whole(dataset, pipeline, ranks)
            if unsuitable is None:
                unsuitable = _stream(model_name, recipe_path, recipe, output, overwrite=overwrite, resume=resume)
                if unsuitable is None:
                    return
            place = None
            reason = unsuitable if dataset is None else why_not_resumable(model_name, recipe, ranks)
            if reason is None:
                task = _task(model_name, recipe, dataset, pipeline, samples)
                place = stack.enter_context(_calibrated_workplace(output, task, overwrite=overwrite, resume=resume))
                if place.is_moved:
                    return
            elif resume:
                raise SRDError(f"{model_name} cannot be resumed, so leave --resume out: {reason}")
            _seed(seed)
            output.parent.mkdir(parents=True, exist_ok=True)
            folder = output.parent if place is None else place.directory
            model = stack.enter_context(_loaded(model_name, folder, ranks, max_memory))
            tokenizer = load_tokenizer(model_name)
        for modifier in _srd_modifiers(recipe):
            modifier.spool_dir = modifier.spool_dir or str(folder)
            # data that was given is used, if only for importance.safetensors
            modifier.requires_calibration_data |= dataset is not None and modifier.quantizes_itself
            if place is not None:
                modifier.resume_in(place)
        data = _calibration(dataset, model, tokenizer, ranks, place, **samples)
        try:
            with ranks.watched():
                with _resumed(recipe) if resume else nullcontext():
                    _oneshot(recipe_path, model=model, tokenizer=tokenizer, recipe=recipe, pipeline=pipeline, **data)
                _save(model, tokenizer, output, ranks, place, overwrite=overwrite)
        finally:
            for modifier in _srd_modifiers(recipe):
                modifier.close()


def _seed(seed: int) -> None:
    import transformers

    transformers.set_seed(seed)


def _task(
    model_name: str,
    recipe: "Recipe",
    dataset: str | Sequence[Sequence[int]] | None,
    pipeline: str,
    samples: dict[str, int],
) -> dict[str, str]:
    """What a calibrated quantization is made of; its data are compared when they are read."""
    others = {"--dataset or --pipeline": pipeline}
    if dataset == SELF:  # written once, and kept
        others["set of samples"] = f"{SELF} {samples}"
    return task_of(find_safetensors(model_name), recipe, others)


def _calibrated_workplace(
    output: Path, task: dict[str, str], *, overwrite: bool, resume: bool
) -> AbstractContextManager[Workplace[Any]]:
    from srd_modifier.modifier.finished import FinishedStep

    return workplace(output, task, FinishedStep.parse, overwrite=overwrite, resume=resume)


def _resumed(recipe: "Recipe") -> AbstractContextManager[None]:
    """For a calibration that is resumed: what it need not do again."""
    from srd_modifier.modifier.passes import without_idle_passes

    return without_idle_passes(_srd_modifiers(recipe)[0].is_idle)


def _save(
    model: Any, tokenizer: Any, output: Path, ranks: Ranks, place: Workplace[Any] | None, *, overwrite: bool
) -> None:
    """Save model and tokenizer in one step; every process takes part, and the first writes."""
    with ExitStack() as stack:
        directory = output
        with ranks.together():
            if ranks.first:
                directory = stack.enter_context(new_directory(output, overwrite=overwrite))
                if place is not None:
                    place.note_staging(directory)
        model.save_pretrained(str(directory), save_compressed=True, max_shard_size=MAX_FILE)
        with ranks.together():
            if ranks.first:
                tokenizer.save_pretrained(str(directory))
    ranks.agree()  # it is in its place when any of them ends


def _why_whole(dataset: object, pipeline: str, ranks: Ranks) -> str | None:
    """Why the model is held whole, whatever its recipe; None if its layers may come one by one."""
    if dataset is not None:
        return "the recipe gets calibration data"
    if pipeline not in _STREAMED_PIPELINES:
        return f"the pipeline is {pipeline}"
    return None if ranks.size == 1 else "several processes divide the work"


def _stream(
    model_name: str, recipe_path: Path, recipe: "Recipe", output: Path, *, overwrite: bool, resume: bool
) -> str | None:
    """Quantize layer by layer; or say why that is not possible, having done nothing."""
    from srd_modifier.planning.source import read_source
    from srd_modifier.streaming.run import StreamedModel

    try:
        directory = find_safetensors(model_name)
    except SRDError as error:
        return str(error)  # Transformers has a message of its own
    streamed = StreamedModel(read_source(str(directory)), recipe)
    if streamed.unsuitable is None:
        tokenizer = load_tokenizer(model_name)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            streamed.quantize(output, tokenizer, overwrite=overwrite, resume=resume)
        except SRDError:
            raise
        except ValueError as error:
            raise _refused(recipe_path, error) from error
        finally:
            for modifier in _srd_modifiers(recipe):
                modifier.close()
    return streamed.unsuitable


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
    except SRDError:
        raise
    except ValueError as error:
        raise _refused(recipe_path, error) from error
    except RuntimeError as error:
        if _NO_ACCELERATOR not in str(error):
            raise
        raise RecipeError(
            f"{recipe_path}: this llm-compressor runs AWQ only on a machine with an accelerator; "
            "docs/upstream.md says why, and how to run it without one"
        ) from error


def _refused(recipe_path: Path, error: ValueError) -> RecipeError:
    """llm-compressor's own way to refuse a recipe, at length, in a sentence."""
    return RecipeError(f"{recipe_path}: llm-compressor refuses it: {' '.join(str(error).split())}")


def _check_data(path: Path, recipe: "Recipe", dataset: str | Sequence[Sequence[int]] | None) -> None:
    needing = [type(m).__name__ for m in recipe.modifiers if m.requires_calibration_data]
    if needing and dataset is None:
        raise SRDError(f"{path}: {needing[0]} needs calibration data; give --dataset a text file, or --dataset self")


def _srd_modifiers(recipe: "Recipe") -> list[Any]:
    from srd_modifier.modifier import SRDModifier

    return [modifier for modifier in recipe.modifiers if isinstance(modifier, SRDModifier)]


def _loaded(name: str, parent: Path, ranks: Ranks, max_memory: int | None) -> AbstractContextManager[Any]:
    if ranks.size == 1:
        return loaded_model(name, parent, max_memory=max_memory)
    if max_memory is not None:
        raise SRDError("--max-memory is for one process; each of several holds the whole model, leave it out")
    return loaded_model(name, parent, max_memory=sys.maxsize)


def _calibration(
    dataset: str | Sequence[Sequence[int]] | None,
    model: Any,
    tokenizer: Any,
    ranks: Ranks,
    place: Workplace[Any] | None,
    **settings: int,
) -> dict[str, Any]:
    """The arguments of `oneshot` that concern data; the same samples in every process, which takes its part of them."""
    if dataset is None:
        return {}
    samples: list[list[int]] | None = None
    with ranks.together():
        if ranks.first and isinstance(dataset, str) and not _is_own(dataset):
            _check_known(dataset)
        elif ranks.first:
            kept = None if place is None or dataset != SELF else place.directory / _SAMPLES
            samples = _samples(dataset, model, tokenizer, kept, **settings)
    samples = ranks.from_first(samples)
    common: dict[str, Any] = {
        "max_seq_length": settings["max_seq_length"],
        "shuffle_calibration_samples": False,  # the order is ours, and the same every time
    }
    if samples is None:
        return {"dataset": dataset, "num_calibration_samples": settings["num_samples"], **common}
    common["max_seq_length"] = max(settings["max_seq_length"], *map(len, samples))
    own = own_part(as_dataset(samples))
    return {"dataset": own, "num_calibration_samples": len(own), **common}


def _is_own(dataset: str) -> bool:
    """Whether we read the data ourselves: no data set that llm-compressor knows by name."""
    return dataset == SELF or bool(Path(dataset).suffix) or Path(dataset).exists()


def _samples(
    dataset: str | Sequence[Sequence[int]], model: Any, tokenizer: Any, kept: Path | None, **settings: int
) -> list[list[int]]:
    """Token ids: as they are given, from the model itself, or from a file.

    Those of the model are kept in a file, if one is given, and read from it where it is there.
    """
    if not isinstance(dataset, str):
        if not dataset or min(map(len, dataset)) < 2:
            raise SRDError("there is no text to calibrate on: samples are of two token ids or more")
        return [list(sample) for sample in dataset]
    if dataset == SELF:
        if kept is not None and kept.is_file():
            return _kept_samples(kept)
        samples = from_model(model, tokenizer, **settings)
        if kept is not None:
            write_text(kept, json.dumps(samples))
        return samples
    return from_file(Path(dataset), tokenizer, **settings)


def _kept_samples(path: Path) -> list[list[int]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SRDError(f"cannot read {path}: {error}; pass --overwrite instead of --resume to start anew") from error


def _check_known(dataset: str) -> None:
    """Raise SRDError for the name of a data set that llm-compressor does not know."""
    from llmcompressor.transformers.data import TextGenerationDataset

    known = {*TextGenerationDataset.registered_names(), *TextGenerationDataset.registered_aliases()}
    if dataset.lower().replace("_", "-") not in known:
        raise SRDError(
            f"{dataset} is neither a file nor a data set that llm-compressor knows: {', '.join(sorted(known))}"
        )
