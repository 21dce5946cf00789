"""Trains an embedded model from scratch: `python -m training.train --help`.

Four stages, each of which goes on where it was interrupted: the VAE on crops of rendered pictures, the
latents of all training pictures, the VAE's decoder once more on whole pictures, and the UNet together
with its text encoder. `shapes-flow` has the VAE of `shapes` and its own last stage.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from aae_batch.sampling.model.attention_layers import cross_attention_layers
from aae_batch.sampling.model.loading import EMBEDDED, SHAPES_FLOW_MODEL, SHAPES_MODEL, source_of
from aae_batch.sampling.model.recorder import AttentionRecorder, Layer
from aae_batch.sampling.words import KNOWN_WORDS
from aae_batch.shapes.world import SHAPES
from training import flow, networks
from training.examples import Batch, CaptionMix, Examples, outlines, pixels, scenes
from training.fitting import Place, fit, save


@dataclass(frozen=True)
class Settings:
    """Everything that the weights depend on, besides the number of workers."""

    model: str = SHAPES_MODEL
    seed: int = 0
    pictures: int = 24_000
    vae_steps: int = 2_200
    vae_batch: int = 8
    vae_crop: int = 80
    vae_lr: float = 2e-3
    kl_weight: float = 1e-4
    alignment_weight: float = 0.5
    decoder_steps: int = 400
    decoder_batch: int = 12
    decoder_lr: float = 1e-3
    unet_steps: int = 12_000
    unet_batch: int = 64
    unet_lr: float = 1e-3
    unet_decay: float = 0.3
    """The learning rate is constant, and falls to zero over this last share of the steps."""
    grounding_weight: float = 0.05
    flow_steps: int = 6_000
    ema: float = 0.998
    mix: CaptionMix = CaptionMix()


ALIGNMENT_NOISE = 0.3
"""In standard deviations of the latents. It keeps apart what captions name."""

# --- VAE -----------------------------------------------------------------------------------------


class VAELoss(nn.Module):
    """Reconstruction error (squared plus a tenth of absolute), a weak pull of the latents to N(0, 1), and
    an alignment error: how far from what captions name, cell by cell, a linear map of the noisy latents is.

    Captions name hues and shapes. Left to itself the VAE codes the colours along one line, on which a
    blend of two is a third, and the shapes in nothing but their outlines, which the UNet is slow to bind
    to words. After VA-VAE (Yao et al., CVPR 2025, arXiv 2501.01423), with labels for features.
    """

    def __init__(self, vae: AutoencoderKL, kl_weight: float, alignment_weight: float) -> None:
        super().__init__()
        self.vae, self.kl_weight, self.alignment_weight = vae, kl_weight, alignment_weight
        self.read = nn.Conv2d(vae.config.latent_channels, 3 + len(SHAPES), kernel_size=1)

    def forward(self, images: Tensor, shapes: Tensor) -> Tensor:
        """Args: images: [batch, 3, h, w]; shapes: [batch, shapes, h, w], 1 where one is seen."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample()
        error = self.vae.decode(latents).sample - images
        kl = posterior.kl() / posterior.mean[0].numel()

        hues = images - images.mean(dim=1, keepdim=True)
        named = F.avg_pool2d(
            torch.cat([hues, shapes], dim=1), images.shape[-1] // latents.shape[-1]
        )
        spread = latents.detach().std(dim=(0, 2, 3), keepdim=True)
        noisy = latents + ALIGNMENT_NOISE * spread * torch.randn_like(latents)
        return (
            error.square().mean()
            + 0.1 * error.abs().mean()
            + self.kl_weight * kl.mean()
            + self.alignment_weight * (self.read(noisy) - named).square().mean()
        )


def train_vae(settings: Settings, place: Place) -> AutoencoderKL:
    torch.manual_seed(settings.seed)
    vae = networks.vae().to(place.device)
    loss_of = VAELoss(vae, settings.kl_weight, settings.alignment_weight).to(place.device)

    def batch_loss(model: nn.Module, step: int) -> dict[str, Tensor]:
        random = place.random(settings.seed, "vae", step)
        torch.manual_seed(random.getrandbits(62))
        return {"loss": model(*_crops(settings, place, random))}

    fit(
        "vae",
        loss_of,
        batch_loss,
        settings.vae_steps,
        settings.vae_lr,
        decay=0.5,
        ema=None,
        place=place,
    )
    _normalise(vae, settings, place)
    return vae


def _crops(settings: Settings, place: Place, random: Random) -> tuple[Tensor, Tensor]:
    """Parts of fresh pictures, most of them with an object near the middle, and where each shape is in
    them: [batch, 3, crop, crop] and [batch, shapes, crop, crop]."""
    crops, shapes = [], []
    for scene in scenes(settings.vae_batch // place.workers, random.getrandbits(62)):
        middle = random.choice(scene.objects)
        size, most = settings.vae_crop, networks.SIZE - settings.vae_crop
        left, top = (
            min(max(int(at - size / 2 + random.uniform(-16, 16)), 0), most)
            for at in (middle.x, middle.y)
        )
        window = np.s_[:, top : top + size, left : left + size]
        crops.append(pixels(scene)[window])
        shapes.append(outlines(scene)[window])
    return (
        torch.from_numpy(np.stack(crops)).to(place.device),
        torch.from_numpy(np.stack(shapes)).to(place.device),
    )


@torch.no_grad()
def _normalise(vae: AutoencoderKL, settings: Settings, place: Place) -> None:
    """Give every latent channel mean 0, and all of them together a variance of 4, as four channels of unit
    variance have, inside the 1x1 convolutions around them.

    One factor for all keeps large what captions name, and small what is detail.
    """
    images = torch.from_numpy(np.stack([pixels(scene) for scene in scenes(512, settings.seed + 1)]))
    means = torch.cat(
        [vae.encode(part.to(place.device)).latent_dist.mean for part in images.split(32)]
    )
    mean, variance = means.mean(dim=(0, 2, 3)), means.var(dim=(0, 2, 3))
    scale = (variance.sum() / 4).sqrt()
    channels = len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= scale
    into.weight[:channels] /= scale
    into.bias[:channels] = (into.bias[:channels] - mean) / scale
    into.bias[channels:] -= 2 * scale.log()  # the other half is the log variance
    place.log(stage="normalise", std=[round(s, 3) for s in (variance.sqrt() / scale).tolist()])


@torch.no_grad()
def encode(vae: AutoencoderKL, settings: Settings, place: Place) -> Tensor:
    """The mean latents of this worker's share of the training pictures."""
    mine = scenes(settings.pictures, settings.seed)[place.rank :: place.workers]
    latents = []
    for start in range(0, len(mine), 64):
        images = np.stack([pixels(scene) for scene in mine[start : start + 64]])
        latents.append(
            vae.encode(torch.from_numpy(images).to(place.device)).latent_dist.mean.half().cpu()
        )
    return torch.cat(latents)


class DecoderLoss(nn.Module):
    """Reconstruction error from given latents; the encoder stays as it is."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)

    def forward(self, latents: Tensor, images: Tensor) -> Tensor:
        error = self.vae.decode(latents).sample - images
        return error.square().mean() + 0.1 * error.abs().mean()


def train_decoder(vae: AutoencoderKL, settings: Settings, place: Place, latents: Tensor) -> None:
    """Accustom the decoder to whole pictures.

    Its group norms see other statistics there than in crops, which have less background: without
    this stage it takes green for blue.
    """
    pictures = scenes(settings.pictures, settings.seed)

    def batch_loss(model: nn.Module, step: int) -> dict[str, Tensor]:
        random = place.random(settings.seed, "decoder", step)
        chosen = random.sample(range(len(pictures)), settings.decoder_batch // place.workers)
        images = torch.from_numpy(np.stack([pixels(pictures[i]) for i in chosen]))
        return {"loss": model(latents[chosen].float().to(place.device), images.to(place.device))}

    loss_of = DecoderLoss(vae.train())
    fit(
        "decoder",
        loss_of,
        batch_loss,
        settings.decoder_steps,
        settings.decoder_lr,
        decay=0.6,
        ema=None,
        place=place,
    )


def half_precision(place: Place) -> torch.autocast:
    """bfloat16 where the device multiplies in it; processors without it are ten times slower."""
    fast = place.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(place.device.type, torch.bfloat16, enabled=fast)


# --- UNet and text encoder -----------------------------------------------------------------------


class DenoisingLoss(nn.Module):
    """The squared error of the predicted velocity, plus a grounding loss on the cross-attention maps.

    The grounding loss is the cross entropy between where a cell looks and where it should: at the
    words of the object it shows, else at the start token. It is in the spirit of TokenCompose (Wang
    et al., CVPR 2024, arXiv 2312.03626), and gives in an hour the localised maps that large models
    learn from hundreds of millions of pictures.
    """

    def __init__(self, unet, text_encoder, tokenizer, grounding_weight: float) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.tokenizer, self.grounding_weight = tokenizer, grounding_weight
        self.scheduler = networks.scheduler()
        layers = cross_attention_layers(unet, level=1)
        self.recorder = AttentionRecorder([Layer(layer) for layer in layers])

    def forward(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        tokens = self.tokenizer(
            batch.captions, padding="max_length", truncation=True, return_tensors="pt"
        )
        text = self.text_encoder(tokens.input_ids.to(device)).last_hidden_state

        latents = batch.latents.to(device)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        velocity = self.scheduler.get_velocity(latents, noise, timesteps)
        with self.recorder.recording():
            predicted = self.unet(noisy, timesteps, text).sample
        denoising = F.mse_loss(predicted, velocity)

        looked = self.recorder.maps.clamp_min(1e-6).log()
        off = -(batch.grounding.to(device) * looked).sum(dim=-1).mean(dim=-1)
        grounding = off[batch.grounded.to(device)].mean()
        return {
            "loss": denoising + self.grounding_weight * grounding,
            "denoising": denoising.detach(),
            "grounding": grounding.detach(),
        }


def _fit_to_captions(
    stage: str,
    loss_of: nn.Module,
    steps: int,
    settings: Settings,
    place: Place,
    examples: Examples,
) -> None:
    """Train a network and its text encoders on captioned latents, and leave averaged weights."""

    def batch_loss(model: nn.Module, step: int) -> dict[str, Tensor]:
        random = place.random(settings.seed, stage, step)
        torch.manual_seed(random.getrandbits(62))
        batch = examples.batch(settings.unet_batch // place.workers, settings.mix, random)
        with half_precision(place):
            return model(batch, place.device)

    fit(
        stage,
        loss_of,
        batch_loss,
        steps,
        settings.unet_lr,
        decay=settings.unet_decay,
        ema=settings.ema,
        place=place,
    )


def train_unet(settings: Settings, place: Place, examples: Examples) -> tuple[nn.Module, nn.Module]:
    """The UNet and the text encoder, with the averaged weights."""
    torch.manual_seed(settings.seed)
    words = networks.tokenizer()
    unet, text_encoder = networks.unet(), networks.text_encoder(words)
    unet.set_attn_processor(AttnProcessor())  # at this size faster on a CPU than fused attention
    loss_of = DenoisingLoss(unet, text_encoder, words, settings.grounding_weight).to(place.device)

    _fit_to_captions("unet", loss_of, settings.unet_steps, settings, place, examples)
    loss_of.recorder.close()
    return unet, text_encoder


# --- the transformer of shapes-flow and its text encoders ----------------------------------------


def train_flow(settings: Settings, place: Place, examples: Examples, vae: AutoencoderKL):
    """Return the pipeline of `shapes-flow`, with the averaged weights."""
    pipe = flow.pipeline(vae, settings.seed)
    loss_of = flow.FlowLoss(pipe, settings.grounding_weight).to(place.device)
    _fit_to_captions("flow", loss_of, settings.flow_steps, settings, place, examples)
    loss_of.recorder.close()
    return pipe


# --- the program ---------------------------------------------------------------------------------


def train(rank: int, workers: int, device: str, folder: Path, settings: Settings) -> None:
    """What each worker runs; worker 0 writes the model to `folder/model`."""
    # torch sends workers an interrupt when their parent ends, which a shell lets those in the background
    # ignore: they would go on, beside those of the next start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    place = Place(rank, workers, torch.device(device), folder)
    if workers > 1:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder.resolve()}/rendezvous",
            rank=rank,
            world_size=workers,
        )
    of_flow = settings.model == SHAPES_FLOW_MODEL
    vae = embedded_vae(place) if of_flow else _vae(settings, place)
    latents = _latents(vae, settings, place)
    examples = Examples(scenes(settings.pictures, settings.seed), latents, networks.tokenizer())
    if of_flow:
        pipe = train_flow(settings, place, examples, vae)
    else:
        train_decoder(vae, settings, place, latents)
        unet, text_encoder = train_unet(settings, place, examples)
        pipe = networks.pipeline()
        pipe.vae.load_state_dict(vae.state_dict())
        pipe.unet.load_state_dict(unet.state_dict())
        pipe.text_encoder.load_state_dict(text_encoder.state_dict())
    if rank == 0:
        export(folder / "model", pipe)
    place.together()


def embedded_vae(place: Place) -> AutoencoderKL:
    """The VAE of the embedded diffusion model."""
    return AutoencoderKL.from_pretrained(source_of(SHAPES_MODEL), subfolder="vae").to(place.device)


def _vae(settings: Settings, place: Place) -> AutoencoderKL:
    file = place.folder / "vae_done.pt"
    vae = networks.vae().to(place.device)
    if not file.exists():
        vae = train_vae(settings, place)
        if place.rank == 0:
            save(file, vae.state_dict())
    place.together()
    vae.load_state_dict(torch.load(file, map_location=place.device, weights_only=True))
    return vae


def _latents(vae: AutoencoderKL, settings: Settings, place: Place) -> Tensor:
    """The mean latents of all training pictures; every worker encodes its share."""
    file = place.folder / "latents.pt"
    if not file.exists():
        parts = [place.folder / f"latents_{rank}.pt" for rank in range(place.workers)]
        save(parts[place.rank], encode(vae.eval(), settings, place))
        place.together()
        if place.rank == 0:
            size = (networks.LATENT_CHANNELS, networks.LATENT_SIZE, networks.LATENT_SIZE)
            latents = torch.empty(settings.pictures, *size, dtype=torch.half)
            for rank, part in enumerate(parts):
                latents[rank :: place.workers] = torch.load(part, weights_only=True)
            save(file, latents)
    place.together()
    return torch.load(file, weights_only=True)


def export(folder: Path, pipe) -> None:
    """Write the model as a diffusers folder, its weights as float16 safetensors."""
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).init_kwargs[KNOWN_WORDS] = [*networks.WORDS]
    pipe.to(torch.float16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description="Train an embedded model from scratch. Run it again to go on after an interruption.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("shapes-training"),
        help="folder of the run: checkpoints, curve, and the model in model/",
    )
    parser.add_argument(
        "--model", choices=tuple(EMBEDDED), default=SHAPES_MODEL, help="which of them"
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument(
        "--workers",
        type=int,
        default=1 if cuda else os.cpu_count(),
        help="processes that share a batch",
    )
    parser.add_argument(
        "--unet-steps", type=int, default=Settings.unet_steps, help="training steps of the UNet"
    )
    parser.add_argument(
        "--vae-steps", type=int, default=Settings.vae_steps, help="training steps of the VAE"
    )
    parser.add_argument(
        "--flow-steps",
        type=int,
        default=Settings.flow_steps,
        help="training steps of the transformer of shapes-flow",
    )
    options = parser.parse_args()
    settings = Settings(
        model=options.model,
        unet_steps=options.unet_steps,
        vae_steps=options.vae_steps,
        flow_steps=options.flow_steps,
    )

    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "settings.json").write_text(json.dumps(asdict(settings), indent=2) + "\n")
    (options.folder / "rendezvous").unlink(missing_ok=True)
    arguments = (options.workers, options.device, options.folder, settings)
    if options.workers > 1:
        torch.multiprocessing.spawn(train, arguments, nprocs=options.workers)
    else:
        train(0, *arguments)


if __name__ == "__main__":
    main()
