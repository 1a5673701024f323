"""Opens folders with plain transformers of any release, and says what it makes of them: `python opened.py FOLDER ...`

A line of JSON for each folder: the ids of awkward texts, and the logits of one sequence; or `{"error": text}`. This file is run
by transformers 4 as well, so it imports nothing of this project.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()


def opened(folder):
    """Ids by text where there is a tokenizer; logits of 24 tokens in float32."""
    folder, result = Path(folder), {}
    if (folder / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = json.loads((folder / "texts.json").read_text())
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
        result["ids"] = [tokenizer.encode(text) for text in texts]
        result["chat"] = tokenizer.apply_chat_template(messages, tokenize=False) if tokenizer.chat_template else None
        result["special"] = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side]
        result["length"] = tokenizer.model_max_length
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    result["missing"] = sorted(info["missing_keys"])
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others want widths that are multiples of 16 bytes
    with torch.no_grad():
        result["logits"] = model.eval()(torch.arange(3, 27).view(1, -1)).logits[0, ::6].tolist()
    return result


if __name__ == "__main__":
    for path in sys.argv[1:]:
        try:
            print(json.dumps(opened(path)))
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
