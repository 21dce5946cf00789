"""Small LoRAs with random weights, as diffusers' training scripts save them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RANK = 2


def save_lora(pipe, folder: Path, parts: tuple[str, ...] = ("unet",), seed: int = 0) -> Path:
    """Write a LoRA for the attention of some networks of a pipeline, and return its file. The
    pipeline remains as it was. Skips the test without peft."""
    pytest.importorskip("peft")
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    layers = {}
    for part in parts:
        network = getattr(pipe, part)
        targets = ["q_proj", "v_proj"] if part.startswith("text") else ["to_q", "to_v", "to_out.0"]
        network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), "a")
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(network, adapter_name="a")
    type(pipe).save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


def changes(file: Path, part: str) -> dict[str, torch.Tensor]:
    """What a LoRA adds to the weights of a network, by their names."""
    tensors = load_file(file)
    ups = [name for name in tensors if name.startswith(f"{part}.") and "lora_B" in name]
    assert ups
    return {
        f"{up.removeprefix(f'{part}.').removesuffix('.lora_B.weight')}.weight": tensors[up]
        @ tensors[up.replace("lora_B", "lora_A")]
        for up in ups
    }
