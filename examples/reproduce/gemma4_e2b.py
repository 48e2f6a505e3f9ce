"""Rebuild the published table of Gemma 4 E2B (google/gemma-4-E2B).

    python examples/reproduce/gemma4_e2b.py                   # with the Hugging Face hub and a GPU of 48 GB
    python examples/reproduce/gemma4_e2b.py --smoke           # every step with a small random model, about a minute

The published card calls the model a mixture of 8 experts. Its config.json decides here: it is dense unless the config
has enable_moe_block, and published.md says which it was. The selective rule is the same for both, 40 to 77 % of the
depth, experts included; a router keeps its 16 bits.

The settings of the published table are not known here. This recipe is W4A16 rounded to nearest in groups of 64 with
16-bit scales, 4.25 bits per weight and 12.5 with the full residual. It covers the matrices of the text decoder's
layers. The towers for images and sound, the embeddings (those per layer are half of the model) and
per_layer_model_projection, which belongs to no layer, stay bf16. Rebuilt, all of it in one run: the bf16 original,
Q4_K_M as llama-quantize makes it without and with importance, W4A16 alone, with a residual at 40 to 77 % of the depth
and with the full one, and our calibrated Q4_K_M; each with its perplexity on WikiText-2 (windows of 2048 that advance
by 512), divergence from the original, TruthfulQA MC1, bytes, and llama.cpp's own perplexity of the GGUF files.

What to expect: alpha 1 with the original's perplexity, the selective row between alpha 0 and 1. The GGUF files hold
the text model alone, so their bytes are not those of the whole model less some bits. The model and a candidate are in
memory together: about 42 GB in float32, half of it with --dtype bfloat16.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pipeline

RECIPE = """\
quant_stage:
  quant_modifiers:
    SRDModifier:
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 64}
      ignore: [lm_head, 're:.*vision_tower.*', 're:.*audio_tower.*', 're:.*embed_vision.*', 're:.*embed_audio.*',
        're:.*per_layer_model_projection$', 're:.*router.*']
      residual_group_size: 64
"""

VOCABULARY = 700
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
SPACE = "\u2581"


def write_tokenizer(directory: Path) -> None:
    """A small tokenizer that takes the steps of Gemma's: BPE by rank, no words but at spaces, bytes for the rest."""
    from smoke import TEXT
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # word by word: the pre-tokenizer finds no spaces any more where the normalizer has replaced them
    words = re.findall(r"[^ \n]+ ?|\n+", TEXT.read_text(encoding="utf-8"))
    tokenizer.train_from_iterator(words, trainer)
    # the trainer can only take the bytes as special tokens; they are ordinary ones of the vocabulary
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [entry for entry in description["added_tokens"] if entry["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(description))
    begin = [("<bos>", tokenizer.token_to_id("<bos>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=begin)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(directory)


TABLE = pipeline.Table(
    name="gemma4_e2b",
    title="Gemma 4 E2B",
    model="google/gemma-4-E2B",
    recipe=RECIPE,
    write_tokenizer=write_tokenizer,
    # 35 layers, every fifth with full attention, of which the last 20 use the keys of earlier ones and have a feed-
    # forward of twice the width. Hidden 1536, feed-forward 4 times that, 8 heads of 256 (512 with full attention) and
    # one for keys, embeddings per layer of 256: all of them whole blocks of 256, as here.
    small_model={
        "model_type": "gemma4",
        "dtype": "bfloat16",
        "text_config": {
            "dtype": "bfloat16",
            "vocab_size": VOCABULARY,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "global_head_dim": 64,
            "hidden_size_per_layer_input": 256,
            "sliding_window": 64,
            "final_logit_softcapping": 30.0,
            "max_position_embeddings": 2048,
            "enable_moe_block": False,
        },
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "position_embedding_size": 64,
        },
        "audio_config": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [16, 8],
            "output_proj_dims": 64,
        },
        # of the vocabulary that there is
        "image_token_id": VOCABULARY - 1,
        "video_token_id": VOCABULARY - 2,
        "audio_token_id": VOCABULARY - 3,
        "boi_token_id": VOCABULARY - 4,
        "eoi_token_id": VOCABULARY - 5,
        "boa_token_id": VOCABULARY - 6,
        "eoa_token_index": VOCABULARY - 7,
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    return pipeline.main(TABLE, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
