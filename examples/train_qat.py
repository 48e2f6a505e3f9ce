r"""Train a model into four bits while its bit width falls, in one process or many, and export it.

    python examples/train_qat.py [--model MODEL] [--text FILE | --dataset NAME] [--output DIR]
    torchrun --nproc-per-node 2 examples/train_qat.py ...
    accelerate launch examples/train_qat.py ...

The defaults are the published setting: SmolLM2-1.7B on 4,000 samples of 512 tokens of WikiText-103, once, with AdamW at
2e-5 along a cosine, 64 samples per step; besides, the original model teaches (`--distill 0` for none). A run of minutes
on a CPU:

    python examples/train_qat.py --model examples/tiny-llama --text examples/text/demo.txt --max-seq-length 128 \
        --batch-size 8 --epochs 4 --learning-rate 1e-4

`srd qat` does the same in one process, with calibrated first levels, a picture of the loss, and more formats.
"""

import argparse
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from srd_modifier.gguf.mixture import FileType
from srd_modifier.qat import ScheduledQATCallback
from srd_modifier.qat.data import Collator, check_length, from_data_set, from_text
from srd_modifier.qat.distillation import DistillationTrainer
from srd_modifier.qat.exports.dense import export_dense
from srd_modifier.qat.exports.gguf import export_converted_gguf
from srd_modifier.qat.exports.w4a16 import export_w4a16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-1.7B", help="model directory or name")
    parser.add_argument("--text", type=Path, help="UTF-8 text to train on, or a folder of .txt files")
    parser.add_argument("--dataset", default="wikitext:wikitext-103-raw-v1", help="NAME[:CONFIG[:SPLIT]], if no text")
    parser.add_argument("--output", type=Path, default=Path("out/qat"), help="directory for checkpoints and exports")
    parser.add_argument("--schedule", default="linear", help="linear, cosine, step, constant, or 0:16,0.1:16,0.9:4")
    parser.add_argument("--group-size", type=int, default=64, help="columns per scale")
    parser.add_argument("--distill", type=float, default=1.0, help="share of the loss that is distillation")
    parser.add_argument("--num-samples", type=int, default=4000)
    parser.add_argument("--max-seq-length", type=int, default=512, help="tokens per sample")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--batch-size", type=int, default=64, help="samples per optimizer step, of all processes")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="samples that a process computes at once")
    parser.add_argument("--save-steps", type=int, default=20, help="optimizer steps between two checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--gguf", nargs="*", choices=[*FileType.__members__], default=["Q4_K_M", "Q8_0"])
    options = parser.parse_args()
    at_once = options.micro_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch_size % at_once:
        parser.error(f"--batch-size {options.batch_size} is not a multiple of {at_once}, what is computed at once")

    on_cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(options.output / "checkpoints"),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=options.micro_batch_size,
        gradient_accumulation_steps=options.batch_size // at_once,
        logging_steps=1,
        save_steps=options.save_steps,
        save_total_limit=2,
        use_cpu=not on_cuda,
        bf16=on_cuda,
        dataloader_pin_memory=on_cuda,
        report_to=[],
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    # a step of 2e-5 would be lost in bfloat16: only products are computed in it
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    check_length(options.max_seq_length, model.config)
    sizes = {"max_seq_length": options.max_seq_length, "num_samples": options.num_samples}
    with arguments.main_process_first():  # the others find a data set that it has fetched
        if options.text is not None:
            samples = from_text(options.text, tokenizer, **sizes)
        else:
            samples = from_data_set(options.dataset, tokenizer, **sizes)
    teacher = None
    if options.distill > 0:
        teacher_dtype = torch.bfloat16 if on_cuda else torch.float32
        teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=teacher_dtype)

    callback = ScheduledQATCallback(options.schedule, group_size=options.group_size)
    trainer = DistillationTrainer(
        model,
        arguments,
        train_dataset=samples,
        data_collator=Collator(tokenizer.eos_token_id or 0),
        processing_class=tokenizer,
        callbacks=[callback],
        teacher=teacher,
        weight=options.distill,
    )
    trainer.train(resume_from_checkpoint=options.resume)

    # FSDP gathers the weights for this, so all processes take part
    trained = options.output / "trained"
    trainer.save_model(str(trained))
    if trainer.is_world_process_zero():
        model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
        grids = {name: grid.to("cpu") for name, grid in callback.grids.items()}
        export_dense(model, tokenizer, options.output / "bf16", overwrite=True)
        export_w4a16(model, grids, tokenizer, options.output / "w4a16", overwrite=True)
        for file_type in options.gguf:
            path = options.output / f"{Path(options.model).name}-{file_type}.gguf"
            export_converted_gguf(model, tokenizer, path, FileType[file_type], overwrite=True)
        print(f"trained for {trainer.state.global_step} steps; exports are in {options.output}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
