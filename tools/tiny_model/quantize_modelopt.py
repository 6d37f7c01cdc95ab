"""Quantises the experts of the tiny model to NVFP4 with NVIDIA ModelOpt, and exports them.

    python quantize_modelopt.py CORPUS BF16 OUT

OUT has what `export_hf_checkpoint` writes, and the tokenizer of BF16.
"""

import copy
import json
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

CALIBRATION = (64, 512)  # windows, tokens each


def load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model. Eager, because ModelOpt sees experts only through `linear` calls."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()


def quantised(corpus: Path, folder: Path) -> torch.nn.Module:
    """The fake-quantised model (weights and activations), calibrated on training text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows, length = CALIBRATION
    # Every so many documents, so that all of the text has its part.
    texts = [json.loads(line) for line in (corpus / "train.jsonl").open()][::7]
    rows = tokenizer(texts)["input_ids"]
    stream = [token for row in rows for token in (tokenizer.bos_token_id, *row)]
    ids = torch.tensor(stream[: windows * length]).view(windows, length)

    def calibrate(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for batch in ids.split(8):
                model(batch)

    config = copy.deepcopy(mtq.NVFP4_EXPERTS_ONLY_CFG)
    return mtq.quantize(load(folder, torch.bfloat16), config, calibrate)


def main() -> None:
    """Quantises and exports."""
    corpus, source, out = map(Path, sys.argv[1:])
    torch.set_num_threads(2)
    export_hf_checkpoint(quantised(corpus, source), export_dir=out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((source / name).read_bytes())


if __name__ == "__main__":
    main()
