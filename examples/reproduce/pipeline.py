"""What the scripts of this folder share: from an original model to its published table, measured anew in one run.

A script names its model, its recipe and the small stand-in of `--smoke`, and calls `main`. The steps, each of which an
interrupted run finds done when it is started again with the same options:

    text            what everything is calibrated on (`calibration_text`)
    training        only where the script has one: of the original; the checkpoint is then made of what comes out
    checkpoint      the recipe through llm-compressor: W4A16, with what it loses as an int8 residual
    GGUF files      Q4_K_M calibrated by us, and as `llama-quantize` makes it, with importance and without
    comparison      all rows on the same tasks, `srd_modifier.evaluation.comparison`
    llama.cpp       its own perplexity of each GGUF file (`llamacpp_perplexity`)
    report          results.json, table.md, plots, and published.md in the layout of the model cards (`published`)
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srd_modifier.errors import SRDError

if TYPE_CHECKING:
    from calibration_text import CalibrationText

    from srd_modifier.evaluation.comparison.candidate import Candidate
    from srd_modifier.evaluation.tasks.base import Task

REPOSITORY = Path(__file__).parents[2]
PERPLEXITY, QUESTIONS, OWN_PERPLEXITY = "wikitext2", "truthfulqa_mc1", "wikitext2_llamacpp"
SELECTIVE_CHUNK = "reasoning"  # 40 to 77 % of the depth, the published selective rule

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

_FLOAT32_NOTE = (
    "The model was read as float32, for float32 scales; so its embeddings, head and norms are float32 on disk too, in "
    "twice the bytes of the original's."
)

# The recipe of the first published tables. Their float32 scales of W4 come from `Table.float32_scales`.
NEAREST_IN_GROUPS_OF_64 = """\
quant_stage:
  quant_modifiers:
    SRDModifier:
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 64}
      ignore: [lm_head]
      residual_group_size: 64
      scale_dtype: float32
"""

# The stand-in of SmolLM2-1.7B, for the two scripts that have it: 24 layers, hidden 2048, 32 heads, each with keys of
# its own, feed-forward 4 times that, tied; all widths are whole groups of 128 and blocks of 256.
SMALL_SMOLLM2_1_7B: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class Trained:
    """A model that was made of the original.

    Attributes:
        model: its dense weights, of which the checkpoint is made in the original's place.
        name: what the labels of the checkpoint's rows begin with.
        note: what readers should know about them.
        rows: what else is measured of it.
        description: how it was trained, in a few words.
    """

    model: Path
    name: str
    note: str
    rows: tuple["Candidate", ...]
    description: str


@dataclass(frozen=True)
class Training:
    """How a script makes another model of the original, before that is quantized.

    Attributes:
        add_options: adds those that it alone has.
        made_of: what decides the weights that come out, by the options, as JSON has it; refuses what is at fault.
        run: makes the model of the original, as it was named, or finds it made.
    """

    add_options: Callable[[argparse.ArgumentParser], None]
    made_of: Callable[[argparse.Namespace], dict[str, Any]]
    run: Callable[[str, argparse.Namespace], Trained]


@dataclass(frozen=True)
class Table:
    """What a script rebuilds.

    Attributes:
        name: of its folder below out/reproduce.
        title: of the published model.
        model: hub id of the original.
        recipe: of the checkpoint, YAML.
        small_model: config.json of the stand-in that --smoke makes, the same architecture with few and narrow layers.
        float32_scales: whether the scales of W4 are float32. llm-compressor gives them the dtype of the weights, so the
            original is then read as float32, which changes none of its weights.
        needs_data: whether the recipe's quantizer reads the calibration text.
        alphas: dials to measure besides 0 and 1.
        write_tokenizer: writes the stand-in's tokenizer; `None` takes that of examples/tiny-llama.
        training: what the checkpoint is made of is trained first; `None` makes it of the original.
    """

    name: str
    title: str
    model: str
    recipe: str
    small_model: Mapping[str, Any]
    float32_scales: bool = False
    needs_data: bool = False
    alphas: tuple[float, ...] = ()
    write_tokenizer: Callable[[Path], None] | None = None
    training: Training | None = None


@dataclass(frozen=True)
class Sizes:
    """How much is read, in tokens where nothing else is said.

    Attributes:
        ctx: a window of the perplexity.
        stride: what a window advances.
        samples: calibration samples.
        sample_tokens: of each.
        llamacpp_ctx: a window of llama.cpp's own perplexity.
        llamacpp_tokens: of the text, where llama.cpp's server has to be asked for one token at a time.
        max_tokens: of the text, `None` for all.
    """

    ctx: int
    stride: int
    samples: int
    sample_tokens: int
    llamacpp_ctx: int
    llamacpp_tokens: int
    max_tokens: int | None


FULL = Sizes(
    ctx=2048, stride=512, samples=128, sample_tokens=512, llamacpp_ctx=512, llamacpp_tokens=2048, max_tokens=None
)
SMOKE = Sizes(ctx=128, stride=32, samples=4, sample_tokens=128, llamacpp_ctx=64, llamacpp_tokens=128, max_tokens=384)


@dataclass(frozen=True)
class Files:
    """The files of a run.

    Attributes:
        checkpoint: W4A16 and its residual.
        calibrated: Q4_K_M by the layers' outputs.
        weighted: Q4_K_M as `llama-quantize --imatrix` makes it.
        plain: Q4_K_M as `llama-quantize` makes it.
        importance: what `calibrated` measured and `weighted` uses.
    """

    checkpoint: Path
    calibrated: Path
    weighted: Path
    plain: Path
    importance: Path

    @classmethod
    def below(cls, output: Path) -> "Files":
        """Where they lie in an output directory."""
        folder = output / "gguf"
        return cls(
            output / "checkpoint",
            folder / "calibrated-Q4_K_M.gguf",
            folder / "ggml-importance-Q4_K_M.gguf",
            folder / "ggml-Q4_K_M.gguf",
            folder / "imatrix.gguf",
        )


def main(table: Table, description: str | None, arguments: Sequence[str] | None = None) -> int:
    """Run a script; what is at fault with the input is one sentence on stderr and status 1."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser(table, description or "").parse_args(given)
    try:
        published = rebuild(table, options, ("python", f"examples/reproduce/{table.name}.py", *given))
    except SRDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(published.read_text(encoding="utf-8"))
    print(f"wrote {published.name}, results.json, table.md and plots to {published.parent}")
    return 0


def parser(table: Table, description: str) -> argparse.ArgumentParser:
    """The options, which all scripts have in common but for those of a training."""
    result = argparse.ArgumentParser(
        description=description.strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument
    add("--model", default=table.model, help="directory or hub id of the original (%(default)s)")
    add("--output", type=Path, default=Path("out/reproduce") / table.name, help="directory to fill (%(default)s)")
    add("--data-dir", type=Path, help="directory with wiki.test.raw and mc_task.json; the rest comes from the hub")
    add("--calibration", help="text or JSON file, NAME[:CONFIG[:SPLIT]] of the hub, or self, which is the default")
    add(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto is CUDA where there is one (%(default)s)",
    )
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="to compute in (%(default)s)")
    add("--max-tokens", type=int, help="score only so many tokens of WikiText-2, not all")
    add("--limit", type=int, help="ask only the first so many questions of TruthfulQA, not all 817")
    add("--llamacpp-tokens", type=int, help=f"for llama.cpp's own perplexity by its server ({FULL.llamacpp_tokens})")
    add("--smoke", action="store_true", help="all steps with a small random model and a little text, in a minute")
    if table.training is not None:
        table.training.add_options(result)
    return result


def rebuild(table: Table, options: argparse.Namespace, command: Sequence[str]) -> Path:
    """Make and measure everything, and give the path of published.md.

    Raises:
        SRDError: model, data, calibration text or output are at fault.
    """
    sizes = _sizes(options)
    import calibration_text
    import llamacpp_perplexity
    import published
    import torch

    from srd_modifier.evaluation.comparison.report import write_report
    from srd_modifier.evaluation.comparison.run import Setting, compare
    from srd_modifier.evaluation.load import resolve_device

    device = str(resolve_device(options.device))
    output: Path = options.output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SRDError(f"cannot write {output}: {error.strerror or error}") from error
    model, data_dir, source = options.model, options.data_dir, options.calibration or calibration_text.SELF
    if options.smoke:
        model, data_dir, source = _write_stand_ins(table, options, output)
    made_of = {} if table.training is None else {"training": table.training.made_of(options)}

    say("reading the tasks and their data")
    tasks = _tasks(data_dir, sizes, options)
    own_task = llamacpp_perplexity.task(data_dir, sizes, program=llamacpp_perplexity.find_program())
    original = _find_original(model)
    _check_texts(model, [*tasks, own_task])
    text = calibration_text.prepare(
        source, original, output, samples=sizes.samples, sample_tokens=sizes.sample_tokens, device=device
    )
    _check_calibration(model, text, sizes)
    _keep_to(output, table, original, text, sizes, made_of)

    trained = None if table.training is None else table.training.run(model, options)
    files = Files.below(output)
    _make_checkpoint(table, original if trained is None else trained.model, text, sizes, files)
    _make_gguf(original, text, sizes, device, files)

    say("scoring all models")
    reference, candidates = _models(table, model, original, trained, files)
    results = compare(
        reference,
        candidates,
        tasks,
        output,
        setting=Setting(dtype=getattr(torch, options.dtype), device=options.device),
        command=command,
        settings={
            "max_tokens": sizes.max_tokens,
            "limit": options.limit,
            "calibration": text.name,
            "training": None if trained is None else trained.description,
        },
        progress=bar,
        say=say,
    )
    say("asking llama.cpp for its own perplexity of the GGUF files")
    gguf = [Path(each.model) for each in candidates if Path(each.model).suffix == ".gguf"]
    results = llamacpp_perplexity.add_to(results, gguf, own_task, output, device=device, progress=bar)
    write_report(results, output)
    return published.write(results, table, original, output / "published.md")


def _sizes(options: argparse.Namespace) -> Sizes:
    sizes = SMOKE if options.smoke else FULL
    given = {name: getattr(options, name) for name in ("max_tokens", "llamacpp_tokens")}
    sizes = replace(sizes, **{name: value for name, value in given.items() if value is not None})
    # of llama.cpp's convention; said here and not after hours
    if sizes.llamacpp_tokens < 2 * sizes.llamacpp_ctx:
        raise SRDError(
            f"--llamacpp-tokens must be at least {2 * sizes.llamacpp_ctx}, two windows, got {sizes.llamacpp_tokens}"
        )
    return sizes


def _write_stand_ins(table: Table, options: argparse.Namespace, output: Path) -> tuple[str, Path, str]:
    """The small model, data and calibration text of --smoke, but for what was given."""
    import smoke
    import torch

    torch.set_num_threads(1)  # what is so small gains nothing by more, and waits for them where processors are few
    model = smoke.write_model(table.small_model, output / "original", table.write_tokenizer)
    data_dir = options.data_dir or smoke.write_data(output / "data")
    source = options.calibration or str(smoke.write_calibration(output / "data"))
    return str(model), data_dir, source


def _tasks(data_dir: Path | None, sizes: Sizes, options: argparse.Namespace) -> list["Task"]:
    from srd_modifier.evaluation.tasks.find import TaskOptions, find_tasks

    tasks = find_tasks(
        (PERPLEXITY, QUESTIONS),
        TaskOptions(
            data_dir=data_dir,
            ctx=sizes.ctx,
            stride=sizes.stride,
            max_tokens=sizes.max_tokens,
            limit=options.limit,
        ),
    )
    for task in tasks:
        _ = task.info  # reads the data
    return tasks


def _find_original(model: str) -> Path:
    from srd_modifier.checkpoint.locate import find_model

    return find_model(model, fetch_weights=True)


def _check_texts(model: str, tasks: Sequence["Task"]) -> None:
    """Refuse a text that is too short for its windows, or a model without tokenizer, before anything is made."""
    from srd_modifier.evaluation.load import load_tokenizer
    from srd_modifier.evaluation.tasks.text import TextTask

    tokenizer = load_tokenizer(model)
    for task in tasks:
        if isinstance(task, TextTask):
            task.rule.windows(len(task.stream(tokenizer)))


def _check_calibration(model: str, text: "CalibrationText", sizes: Sizes) -> None:
    """Refuse a calibration text that the tokenizer cannot make samples of."""
    from srd_modifier.calibration import from_file
    from srd_modifier.evaluation.load import load_tokenizer

    from_file(text.path, load_tokenizer(model), num_samples=sizes.samples, max_seq_length=sizes.sample_tokens)


def _keep_to(
    output: Path,
    table: Table,
    original: Path,
    text: "CalibrationText",
    sizes: Sizes,
    more: Mapping[str, Any],
) -> None:
    """Refuse an output directory whose files were made of something else, and note what they are made of."""
    from srd_modifier.checkpoint.atomic import write_json
    from srd_modifier.evaluation.digest import model_digest

    made_of = {
        "model": model_digest(original),
        "recipe": table.recipe,
        "calibration": text.sha256,
        "samples": sizes.samples,
        "sample_tokens": sizes.sample_tokens,
        **more,
    }
    path = output / "made_of.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != made_of:
        raise SRDError(
            f"{output} holds files of another model, recipe, training or calibration text; choose another --output or "
            "remove it"
        )
    write_json(path, made_of)


def _make_checkpoint(table: Table, model: Path, text: "CalibrationText", sizes: Sizes, files: Files) -> None:
    from srd_modifier.checkpoint.atomic import write_text
    from srd_modifier.quantizing import quantize

    # llm-compressor reads this when it is imported, and tells every step otherwise
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "WARNING")
    if (files.checkpoint / "config.json").is_file():
        return
    say("quantizing to W4A16 with its residual")
    output = files.checkpoint.parent
    recipe = output / "recipe.yaml"
    write_text(recipe, table.recipe)
    source = _read_as_float32(model, output / "as-float32") if table.float32_scales else model
    quantize(
        str(source),
        recipe,
        files.checkpoint,
        dataset=str(text.path) if table.needs_data else None,
        num_samples=sizes.samples,
        max_seq_length=sizes.sample_tokens,
    )


def _read_as_float32(model: Path, view: Path) -> Path:
    """The same files under a config.json that says float32: links, so no second copy of the weights."""
    from srd_modifier.checkpoint.atomic import write_json

    view.mkdir(exist_ok=True)
    for file in model.iterdir():
        link = view / file.name
        if file.is_file() and file.name != "config.json" and not link.exists():
            link.symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # as it was spelled before Transformers 5
    write_json(view / "config.json", {**config, "dtype": "float32"})
    return view


def _make_gguf(original: Path, text: "CalibrationText", sizes: Sizes, device: str, files: Files) -> None:
    from srd_modifier.gguf.calibration.text import Calibration
    from srd_modifier.gguf.export import export_gguf

    # the importance is written last, so where it is the calibrated file is too
    if not files.importance.is_file():
        say("writing the calibrated Q4_K_M")
        calibration = Calibration(
            str(text.path), num_samples=sizes.samples, max_seq_length=sizes.sample_tokens, device=device
        )
        export_gguf(
            original, files.calibrated, calibration=calibration, imatrix_output=files.importance, overwrite=True
        )
    if not files.weighted.is_file():
        say("writing Q4_K_M as llama-quantize does, with importance")
        export_gguf(original, files.weighted, imatrix=files.importance)
    if not files.plain.is_file():
        say("writing Q4_K_M as llama-quantize does")
        export_gguf(original, files.plain, use_importance=False)


def dtype_of(model: Path) -> str:
    """What a model's weights are stored in, as tables call it."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or {}
    found = next((values[key] for values in (config, text) for key in ("dtype", "torch_dtype") if values.get(key)), "")
    return _DTYPES.get(found, found or "the")


def _models(
    table: Table, model: str, original: Path, trained: Trained | None, files: Files
) -> tuple["Candidate", list["Candidate"]]:
    """The reference, and the other rows in their order."""
    from srd_modifier.evaluation.comparison.candidate import Candidate

    def gguf(path: Path, label: str) -> Candidate:
        return Candidate(str(path), label, family=label)

    def dialled(label: str, **settings: Any) -> Candidate:
        return Candidate(str(files.checkpoint), f"{name}{label}", family=f"{name} + D8", notes=notes, **settings)

    name = "W4A16" if trained is None else trained.name
    widened = table.float32_scales and dtype_of(original if trained is None else trained.model) != "fp32"
    notes = (*((_FLOAT32_NOTE,) if widened else ()), *(() if trained is None else (trained.note,)))
    checkpoint = [
        dialled(" alone, alpha 0", alpha=0.0),
        dialled(" + D8, 40-77 % of depth", alpha=1.0, chunks=(SELECTIVE_CHUNK,)),
        *(dialled(f" + D8, alpha {alpha:g}", alpha=alpha) for alpha in table.alphas),
        dialled(" + D8, alpha 1", alpha=1.0),
    ]
    calibrated = gguf(files.calibrated, "Q4_K_M, calibrated")
    return Candidate(model, f"{dtype_of(original)} original"), [
        gguf(files.plain, "Q4_K_M, ggml"),
        gguf(files.weighted, "Q4_K_M, ggml with importance"),
        # what the original comes to without training stands together
        *([*checkpoint, calibrated] if trained is None else [calibrated, *trained.rows, *checkpoint]),
    ]


def say(line: str) -> None:
    """Tell what comes next."""
    print(line, flush=True)


def bar(title: str) -> Callable[[int, int], None]:
    """A bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    bars: list[Any] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, desc=title, disable=None, leave=False))
        bars[0].update(done - bars[0].n)
        if done >= total:
            bars[0].close()

    return show
