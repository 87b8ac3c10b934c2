"""accelerate and restore: of a model, and of diffusers' pipelines with small random networks."""

import copy
import gc
import io
import json
import subprocess
import sys
import weakref

import pytest
import torch
from models import make
from networks import assert_same_network

import dd_kernels as dd

diffusers = pytest.importorskip("diffusers")

from dd_kernels.integrations import diffusers as ours  # noqa: E402


def unet():
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, **blocks
    )


def latent_pipeline():
    """A pipeline with an autoencoder: latents from a U-Net, decoded."""
    torch.manual_seed(2)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(
        latent_channels=3, block_out_channels=(32, 32), norm_num_groups=8, sample_size=32, **kinds
    )
    return diffusers.LDMSuperResolutionPipeline(vae, unet(), diffusers.DDIMScheduler(num_train_timesteps=100))


def draw(pipe, seed=3, steps=3, **options):
    generator = torch.Generator().manual_seed(seed)
    return pipe(batch_size=2, generator=generator, num_inference_steps=steps, output_type="np", **options).images


def pipeline(scheduler=None):
    pipe = diffusers.DDIMPipeline(unet(), scheduler or diffusers.DDIMScheduler(num_train_timesteps=100))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_model_is_compiled_in_place_and_restored():
    model, x, emb = make("latent-diffusion")
    with torch.no_grad():
        plain = model(x, emb)
        same, report = dd.accelerate(model)
        assert same is model
        assert "not captured yet" in str(report)
        assert_same_network(model(x, emb), plain)
        assert report.share == 1
        assert dd.accelerate(model)[1] is report
        assert dd.restore(model) is model
        assert model._compiled_call_impl is None
        assert torch.equal(model(x, emb), plain)
        dd.restore(model)
        assert dd.accelerate(model)[1] is not report


def test_a_model_compiled_before_is_given_back_as_it_was():
    model, _, _ = make("latent-diffusion")
    model.compile(backend="eager")
    before = model._compiled_call_impl
    dd.restore(dd.accelerate(model)[0])
    assert model._compiled_call_impl is before


def test_copies_and_files_of_an_accelerated_model():
    model, x, emb = make("latent-diffusion")
    keys = list(model.state_dict())
    dd.accelerate(model)
    with torch.no_grad():
        y = model(x, emb)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert other._compiled_call_impl is None
            assert_same_network(other(x, emb), y)
    assert list(model.state_dict()) == keys


def test_an_accelerated_model_is_freed():
    model, x, emb = make("latent-diffusion")
    dd.accelerate(model)
    model(x, emb)
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_a_pipeline(graphs_on_cpu):
    """Its network is captured once; other seeds, numbers of steps and noise replay it."""
    pipe = pipeline()
    scheduler, wanted, another = pipe.scheduler, draw(pipe), draw(pipe, seed=4, steps=5, eta=1.0)
    same, report = dd.accelerate(pipe)
    assert same is pipe
    assert type(pipe.scheduler) is ours.DDIMScheduler
    assert dict(pipe.scheduler.config).items() >= dict(scheduler.config).items()
    for image, other in ((draw(pipe), wanted), (draw(pipe, seed=4, steps=5, eta=1.0), another)):
        assert_same_network(torch.from_numpy(image), torch.from_numpy(other))
    assert (graphs_on_cpu.captures, graphs_on_cpu.replays) == (1, 3 + 5)
    assert [network.name for network in report.networks] == ["unet"]
    assert len(report.networks[0].graphs) == 1
    lines = str(report).splitlines()
    assert lines[0].startswith("unet: 1 graph, 21 norms, ")
    assert lines[-1].startswith("scheduler: dd_kernels' DDIMScheduler (")
    assert "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)" in lines[-1]
    assert report.share == 1
    dd.restore(pipe)
    assert pipe.scheduler is scheduler
    assert pipe.unet._compiled_call_impl is None
    assert (draw(pipe) == wanted).all()


def test_a_scheduler_that_the_user_puts_in_afterwards_stays():
    pipe = pipeline()
    dd.accelerate(pipe)
    pipe.scheduler = diffusers.DDPMScheduler()
    assert type(dd.restore(pipe).scheduler) is diffusers.DDPMScheduler


def test_a_constructor_that_puts_their_scheduler_back():
    """What the report says to write after it is what keeps ours."""
    config = {"num_train_timesteps": 100}
    pipe = pipeline(ours.DDIMScheduler(**config))
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    line = dd.accelerate(pipe)[1].notes[0].split("write ")[1].split(", or")[0]
    pipe = pipeline(ours.DDIMScheduler(**config))
    exec(line, {"pipe": pipe, "DDIMScheduler": ours.DDIMScheduler})
    assert type(pipe.scheduler) is ours.DDIMScheduler


def test_a_controlnet_is_compiled_too():
    """Of a pipeline with a U-Net, a ControlNet and an autoencoder each; the text encoder stays."""
    from dd_kernels.integrations.diffusers.accelerate import take_apart

    torch.manual_seed(3)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (8, 16)}
    sizes = {"cross_attention_dim": 8, "attention_head_dim": 2, "norm_num_groups": 4, "layers_per_block": 1}
    net = diffusers.UNet2DConditionModel(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **blocks, **sizes)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **kinds)
    control = diffusers.ControlNetModel.from_unet(net, conditioning_embedding_out_channels=(8, 8))
    pipe = diffusers.StableDiffusionControlNetPipeline(
        vae, None, None, net, control, diffusers.DDIMScheduler(), None, None, requires_safety_checker=False
    )
    networks, _, notes = take_apart(pipe)
    assert {name for name, _ in networks} == {"vae.encoder", "vae.decoder", "unet", "controlnet"}
    assert type(pipe.scheduler) is ours.DDIMScheduler
    assert len(notes) == 1


def test_an_autoencoder_is_compiled_by_halves():
    pipe = latent_pipeline()
    latents = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        wanted = pipe.vqvae.decode(latents).sample
        _, report = dd.accelerate(pipe)
        assert_same_network(pipe.vqvae.decode(latents).sample, wanted)
        pipe.vqvae.encode(torch.randn(1, 3, 16, 16))
    captured = {network.name: len(network.graphs) for network in report.networks}
    assert captured == {"unet": 0, "vqvae.encoder": 1, "vqvae.decoder": 1}


def test_another_scheduler_stays():
    pipe = pipeline()
    pipe.scheduler = diffusers.PNDMScheduler()
    _, report = dd.accelerate(pipe)
    assert type(pipe.scheduler) is diffusers.PNDMScheduler
    assert report.notes == ["scheduler: PNDMScheduler stays, there is no kernel for it"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["accelerated", "our scheduler"])
def test_a_saved_pipeline_loads_without_this_package(tmp_path, how):
    pipe = pipeline()
    if how == "accelerated":
        dd.accelerate(pipe)
    else:
        pipe.scheduler = ours.DDIMScheduler.from_config(pipe.scheduler.config)
    wanted = draw(pipe)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    script = (
        "import sys; sys.modules['dd_kernels'] = None\n"
        "import diffusers, torch\n"
        f"pipe = diffusers.DDIMPipeline.from_pretrained({str(tmp_path)!r})\n"
        "generator = torch.Generator().manual_seed(3)\n"
        "images = pipe(batch_size=2, generator=generator, num_inference_steps=3, output_type='np').images\n"
        "print(float(images.sum()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - float(wanted.sum())) < 0.05


def test_what_is_neither():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module or a diffusers pipeline; got int"):
        dd.accelerate(3)
    with pytest.raises(TypeError, match=r"must be a module or a pipeline; got DDIMScheduler"):
        dd.accelerate(diffusers.DDIMScheduler())


@pytest.mark.slow
def test_handed_on_to_inductor():
    model, x, emb = make("latent-diffusion", blocks=1)
    with torch.no_grad():
        plain = model(x, emb)
        _, report = dd.accelerate(model, inductor=True)
        assert_same_network(model(x, emb), plain)
    assert report.share == 1


def test_accuracy():
    model, x, emb = make("latent-diffusion", blocks=1)
    with pytest.raises(ValueError, match=r"accuracy must be one of 'default', 'high', 'fast'; got 'low'"):
        dd.accelerate(model, accuracy="low")
    with pytest.raises(ValueError, match=r"dtype must be None or 'bfloat16'; got torch.float16"):
        dd.accelerate(model, dtype=torch.float16)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double(), emb.double())
        dd.accelerate(model, accuracy="high")
        assert_same_network(model(x, emb), exact)
