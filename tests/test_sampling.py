"""Seeds, schedulers and the sampler, against plain diffusers on a tiny SDXL."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.config import Config, SampleConfig
from builder.errors import BuilderError
from builder.models import sdxl
from builder.models.checkpoint import Checkpoint
from builder.phases import ClassTable, Phase
from builder.sampling.device import resolve_dtype
from builder.sampling.pixels import blank, to_pixels
from builder.sampling.prompts import encode_prompts
from builder.sampling.sampler import Request, Sampler, load_sampler
from builder.sampling.schedulers import SCHEDULERS, make_scheduler
from builder.sampling.seeds import MAX_INDEX, MAX_RESERVE, permute, round_tables, seed_of, seeds_of

PROMPTS = {"I": "PHASE_I, inflammatory", "P": "PHASE_P, proliferative"}
SIZE = 32
ARCHITECTURE = {
    "text_encoder": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vae": {
        "block_out_channels": [16, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 8,
    },
    "unet": {
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": 1,
        "attention_head_dim": 2,
        "addition_time_embed_dim": 8,
    },
}
CONFIG = SampleConfig(size=SIZE, steps=4, batch_size=3, negative_prompt="blurry")
REQUESTS = [Request("I", 0, 11), Request("P", 1, 2**32 - 1), Request("I", 0, 0)]

KNOWN_SEEDS = [3627260266, 1760982871, 4015199900]

labels = st.integers(0, 63)
indices = st.integers(0, MAX_INDEX)
reserves = st.integers(0, MAX_RESERVE)
run_seeds = st.integers(-(2**70), 2**70)


pytestmark = pytest.mark.usefixtures("one_thread")


def stirred(pipeline):
    """Biases at 0 would hide a wrong conditioning; a last layer at scale gives contrast."""
    pipeline.set_progress_bar_config(disable=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for parameter in (*pipeline.unet.parameters(), *pipeline.vae.decoder.parameters()):
            parameter.data += 0.1 * torch.randn_like(parameter)
    for module in (pipeline.unet, pipeline.vae):
        module.eval()
    return pipeline


def tiny_pipeline():
    return stirred(sdxl.build(ARCHITECTURE, SIZE, seed=3))


def tiny_sampler(config=CONFIG, sizes=None, **keywords):
    return Sampler(tiny_pipeline(), config, PROMPTS, sizes or {}, **keywords)


def plain_pixels(config, requests, original_size, embeddings=None):
    """The same images by plain diffusers, which encodes the prompts itself unless it is handed the embeddings."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = make_scheduler(config.scheduler, pipeline.scheduler.config)
    if embeddings is None:
        prompts = {"prompt": [PROMPTS[request.code] for request in requests]}
        if config.negative_prompt:
            prompts["negative_prompt"] = [config.negative_prompt] * len(requests)
    else:
        positive = [embeddings.positive[request.code] for request in requests]
        prompts = {
            "prompt_embeds": torch.stack([embedding.hidden for embedding in positive]),
            "pooled_prompt_embeds": torch.stack([embedding.pooled for embedding in positive]),
            "negative_prompt_embeds": torch.stack([embeddings.negative.hidden] * len(requests)),
            "negative_pooled_prompt_embeds": torch.stack([embeddings.negative.pooled] * len(requests)),
        }
    images = pipeline(
        **prompts,
        height=SIZE,
        width=SIZE,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        original_size=(original_size, original_size),
        target_size=(SIZE, SIZE),
        generator=[torch.Generator("cpu").manual_seed(request.seed) for request in requests],
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


class TestSeeds:
    def test_reduced_width_is_a_bijection(self):
        for run_seed in range(5):
            values = permute(np.arange(2**16), round_tables(run_seed, half_bits=8))
            assert np.array_equal(np.sort(values), np.arange(2**16))

    @given(run_seeds, st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
    @settings(max_examples=50, deadline=None)
    def test_has_an_inverse(self, run_seed, counters):
        tables = round_tables(run_seed)
        values = permute(counters, tables)
        left, right = values >> 16, values & 0xFFFF
        for table in tables[::-1]:
            left, right = right ^ table[left], left
        assert np.array_equal((left << 16) | right, np.array(counters, np.uint32))

    def test_unique_over_ten_million_indices_and_phases(self):
        seeds = np.concatenate([seeds_of(0, label, np.arange(10_000_000)) for label in (0, 1, 63)])
        seeds.sort()
        assert seeds.dtype == np.uint32
        assert (seeds[1:] > seeds[:-1]).all()

    @given(run_seeds, st.lists(st.tuples(labels, indices, reserves), min_size=2, max_size=50, unique=True))
    @settings(max_examples=50, deadline=None)
    def test_unique_over_labels_indices_reserves_and_same_as_one_by_one(self, run_seed, images):
        one_by_one = [seed_of(run_seed, *image) for image in images]
        assert len(set(one_by_one)) == len(images)
        assert seeds_of(run_seed, *np.array(images).T).tolist() == one_by_one

    def test_never_changes(self):  # or every dataset made before becomes another
        assert [seed_of(0, 0, 0), seed_of(0, 2, 7, 1), seed_of(42, 63, MAX_INDEX, 3)] == KNOWN_SEEDS

    def test_run_seeds_give_unrelated_seeds(self):
        first, second = (seeds_of(run_seed, 0, np.arange(100_000)) for run_seed in (0, 1))
        assert np.intersect1d(first, second).size < 20  # expected by chance: 100,000^2 / 2^32 = 2.3
        assert abs(bits(first ^ second).mean() - 16) < 0.1

    def test_every_bit_of_the_counter_moves_half_of_the_seed(self):
        counters = np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint32)
        tables = round_tables(5)
        for bit in range(32):
            moved = permute(counters, tables) ^ permute(counters ^ np.uint32(1 << bit), tables)
            assert abs(bits(moved).mean() - 16) < 0.2
            share = [(moved >> np.uint32(b) & 1).mean() for b in range(32)]
            assert all(abs(value - 0.5) < 0.05 for value in share)

    @pytest.mark.parametrize(
        "image", [(64, 0, 0), (-1, 0, 0), (0, MAX_INDEX + 1, 0), (0, -1, 0), (0, 0, 4), (0, 0, -1), (0, 1.5, 0)]
    )
    def test_outside_the_ranges(self, image):
        with pytest.raises(BuilderError):
            seed_of(0, *image)

    def test_does_not_import_torch(self):
        code = "import sys, builder.sampling.seeds; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def bits(values):
    return np.bitwise_count(values)


class TestSchedulers:
    def test_unknown_name_is_answered_with_the_nearest(self):
        with pytest.raises(BuilderError, match="did you mean 'dpmpp_2m_karras'"):
            make_scheduler("dpmpp2m_karras", {})

    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_takes_noise_levels_from_the_checkpoint_and_the_solver_from_the_name(self, name):
        given = EulerDiscreteScheduler(
            beta_start=0.001, beta_end=0.02, beta_schedule="scaled_linear", prediction_type="v_prediction",
            use_beta_sigmas=True, steps_offset=1, timestep_spacing="leading",
        ).config  # fmt: skip
        config = make_scheduler(name, given).config
        assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.001, 0.02, "scaled_linear")
        assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "leading")
        assert not config.get("use_beta_sigmas")
        assert bool(config.get("use_karras_sigmas")) == name.endswith("karras")
        assert not config.get("clip_sample")

    def test_a_stochastic_checkpoint_config_becomes_deterministic(self):
        given = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3).config
        config = make_scheduler("dpmpp_2m_karras", given).config
        assert (config.algorithm_type, config.solver_order) == ("dpmsolver++", 2)


class TestAgainstPlainDiffusers:
    """Bit for bit from the same embeddings: the loop does the same operations in the same order.

    Plain diffusers encodes the prompts of a batch together, which moves the pooled embedding by 2e-7, and then a few
    pixels by one level.
    """

    @pytest.mark.parametrize(
        "changes",
        [
            *({"scheduler": name} for name in SCHEDULERS),
            {"guidance": 1.0},
            {"negative_prompt": ""},
            {"steps": 1},
            {"guidance": 7.5, "steps": 9},
        ],
        ids=str,
    )
    def test_same_pixels(self, changes):
        config = SampleConfig(**{"size": SIZE, "steps": 4, "negative_prompt": "blurry", **changes})
        sampler = tiny_sampler(config, {"I": [55], "P": [55]})
        pixels = sampler.generate(REQUESTS).pixels
        assert pixels.std() > 10  # else equality says little
        embeddings = encode_prompts(tiny_pipeline(), PROMPTS, config.negative_prompt)
        assert np.array_equal(pixels, plain_pixels(config, REQUESTS, 55, embeddings))
        from_text = plain_pixels(config, REQUESTS, 55)
        assert np.abs(pixels.astype(int) - from_text).max() <= 1

    def test_own_size_where_none_is_recorded(self):
        batch = tiny_sampler().generate(REQUESTS)
        assert batch.original_sizes == [SIZE] * 3
        assert np.abs(batch.pixels.astype(int) - plain_pixels(CONFIG, REQUESTS, original_size=SIZE)).max() <= 1

    def test_half_precision_stays_near(self):
        exact = tiny_sampler().generate(REQUESTS).pixels.astype(int)
        half = tiny_sampler(dtype=torch.bfloat16).generate(REQUESTS).pixels.astype(int)
        assert 0 < np.abs(exact - half).mean() < 4

    def test_latent_statistics_of_the_autoencoder(self):
        given = {"latents_mean": [0.1, 0.2, -0.3, 0.4], "latents_std": [1.5, 1.0, 0.5, 2.0]}
        architecture = {**ARCHITECTURE, "vae": {**ARCHITECTURE["vae"], **given}}
        pipeline = sdxl.build(architecture, SIZE, seed=3)
        sampler = Sampler(pipeline, CONFIG, PROMPTS, {})
        seen = {}
        sampler._vae.decode = lambda latents, return_dict: (seen.setdefault("latents", latents),)
        sampler._decode(torch.ones(1, 4, 2, 2))
        scale = pipeline.vae.config.scaling_factor
        expected = torch.tensor(given["latents_std"]) / scale + torch.tensor(given["latents_mean"])
        assert torch.allclose(seen["latents"][0, :, 0, 0], expected)


class TestSampler:
    def test_repeats_to_the_byte_here_and_in_another_process(self):
        sampler = tiny_sampler()
        first = sampler.generate(REQUESTS)
        sampler.generate(REQUESTS[:1])  # what came before must not matter
        assert np.array_equal(first.pixels, sampler.generate(REQUESTS).pixels)
        code = (
            "import hashlib, sys, torch; torch.set_num_threads(1); sys.path.insert(0, 'tests');"
            "from test_sampling import REQUESTS, tiny_sampler;"
            "print(hashlib.sha256(tiny_sampler().generate(REQUESTS).pixels.tobytes()).hexdigest())"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert other.split()[-1] == hashlib.sha256(first.pixels.tobytes()).hexdigest()

    def test_shape_order_and_dependence_on_seed_and_phase(self):
        sampler = tiny_sampler()
        batch = sampler.generate([Request("I", 0, 1), Request("P", 1, 1), Request("I", 0, 2), Request("I", 0, 1)])
        assert batch.pixels.shape == (4, SIZE, SIZE, 3) and batch.pixels.dtype == np.uint8
        assert batch.bad == [False] * 4 and batch.seconds > 0
        assert not np.array_equal(batch.pixels[0], batch.pixels[1])
        assert not np.array_equal(batch.pixels[0], batch.pixels[2])
        assert np.abs(batch.pixels[0].astype(int) - batch.pixels[3]).max() <= 1

    def test_original_size_is_picked_by_the_seed_and_conditions_the_image(self):
        sampler = tiny_sampler(sizes={"I": [40, 80, 160], "P": []})
        assert [sampler.original_size("I", seed) for seed in range(4)] == [40, 80, 160, 40]
        batch = sampler.generate(REQUESTS)
        assert batch.original_sizes == [160, SIZE, 40]
        assert not np.array_equal(batch.pixels[0], tiny_sampler().generate(REQUESTS).pixels[0])

    def test_text_encoders_are_no_longer_needed(self):
        pipeline = tiny_pipeline()
        sampler = Sampler(pipeline, CONFIG, PROMPTS, {})
        expected = sampler.generate(REQUESTS).pixels
        pipeline.text_encoder = pipeline.text_encoder_2 = None
        assert np.array_equal(sampler.generate(REQUESTS).pixels, expected)

    def test_leaves_torch_random_state_alone(self):
        sampler = tiny_sampler()
        before = torch.get_rng_state()
        sampler.generate(REQUESTS)
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"scheduler": "euler_a"}, "did you mean 'euler'"),
            ({"dtype": "bf16"}, "sample.dtype is 'bf16'"),
            ({"size": 33}, "multiple of"),
            ({"size": 0}, "size"),
            ({"steps": 0}, "steps"),
            ({"guidance": 0.5}, "guidance"),
            ({"batch_size": 0}, "batch_size"),
        ],
    )
    def test_impossible_settings(self, changes, message):
        with pytest.raises(BuilderError, match=message):
            tiny_sampler(SampleConfig(**{"size": SIZE, **changes}))

    def test_unknown_phase(self):
        with pytest.raises(BuilderError, match="'R'"):
            tiny_sampler().generate([Request("R", 2, 0)])

    def test_dtype_by_device(self):
        assert resolve_dtype("auto", "cpu") == torch.float32
        assert resolve_dtype("auto", "cuda:1") == torch.bfloat16
        assert resolve_dtype("float32", "cuda") == torch.float32


class TestLoadSampler:
    def test_draws_from_a_checkpoint_folder_what_the_pipeline_in_memory_draws(self, tmp_path):
        tiny_pipeline().save_pretrained(tmp_path / "tiny")
        checkpoint = Checkpoint(tmp_path / "tiny", prompts={"I": "another"}, original_sizes={"I": [40, 80]})
        classes = ClassTable([Phase(code, code, prompt) for code, prompt in PROMPTS.items()])
        sampler = load_sampler(checkpoint, Config(sample=CONFIG, classes=classes))
        assert sampler.prompts == PROMPTS  # what the config asks with, not what the checkpoint was trained with
        assert (sampler.dtype_name, bool(sampler.device_model)) == ("float32", True)
        batch = sampler.generate(REQUESTS)
        assert batch.original_sizes == [80, SIZE, 40]
        assert np.array_equal(batch.pixels, tiny_sampler(sizes={"I": [40, 80]}).generate(REQUESTS).pixels)


class TestBadImages:
    def test_not_finite_is_flagged_image_by_image(self):
        sampler = tiny_sampler()
        noise = sampler._noise

        def with_one_nan(requests):
            latents = noise(requests)
            latents[1, 0, 0, 0] = float("nan")
            return latents

        sampler._noise = with_one_nan
        batch = sampler.generate(REQUESTS)
        assert batch.bad == [False, True, False]

    def test_overflow_in_the_denoiser_is_flagged_and_higher_precision_mends_it(self):
        pipeline = tiny_pipeline()
        convolutions = [m for m in pipeline.unet.modules() if isinstance(m, torch.nn.Conv2d)]
        convolutions[0].weight.data *= 1e5  # its output exceeds float16's 65,504; a norm follows
        sampler = Sampler(pipeline, CONFIG, PROMPTS, {}, dtype=torch.float16)
        weights = {name: value.clone() for name, value in sampler._unet.state_dict().items()}
        assert all(torch.isfinite(value).all() for value in weights.values())
        assert all(sampler.generate(REQUESTS).bad)
        assert not any(sampler.generate(REQUESTS, precise=True).bad)
        after = sampler._unet.state_dict()
        assert all(value.dtype == torch.float16 and torch.equal(value, weights[name]) for name, value in after.items())

    def test_precise_from_float32_agrees(self):
        sampler = tiny_sampler()
        expected = sampler.generate(REQUESTS).pixels
        precise = sampler.generate(REQUESTS, precise=True).pixels
        assert np.abs(precise.astype(int) - expected).max() <= 1
        assert np.array_equal(sampler.generate(REQUESTS).pixels, expected)

    def test_black_and_plain_images_are_blank_and_dark_ones_with_content_are_not(self):
        rng = np.random.default_rng(0)
        black = rng.integers(0, 5, (64, 64, 3), np.uint8)
        plain = np.full((64, 64, 3), (180, 90, 80), np.uint8) + rng.integers(0, 3, (64, 64, 3), np.uint8)
        ramp = np.repeat(np.linspace(0, 40, 64).astype(np.uint8)[:, None, None], 64, 1).repeat(3, 2)
        images = torch.from_numpy(np.stack([np.zeros_like(black), black, plain, ramp]))
        assert blank(images).tolist() == [True, True, True, False]

    def test_black_output_of_the_decoder_is_flagged(self):
        pipeline = tiny_pipeline()
        pipeline.vae.decoder.conv_out.weight.data.zero_()
        pipeline.vae.decoder.conv_out.bias.data.fill_(-1)
        assert all(Sampler(pipeline, CONFIG, PROMPTS, {}).generate(REQUESTS).bad)

    def test_pixels_are_rounded_clamped_and_never_undefined(self):
        values = [-5.0, -1.0, 0.0, 1.0, 7.0, float("nan"), float("inf"), -float("inf")]
        pixels = to_pixels(torch.tensor(values).view(1, 1, 1, -1).expand(1, 3, 1, -1))
        assert pixels[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 0, 255, 0]


class TestPrompts:
    def test_shapes_and_zeros_of_an_empty_negative_prompt(self):
        pipeline = tiny_pipeline()
        embeddings = encode_prompts(pipeline, PROMPTS, "")
        assert embeddings.positive["I"].hidden.shape == (77, 64) and embeddings.positive["I"].pooled.shape == (32,)
        assert not embeddings.negative.hidden.any() and not embeddings.negative.pooled.any()
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)
        assert encode_prompts(pipeline, PROMPTS, "").negative.hidden.any()

    def test_prompts_that_differ_only_beyond_the_encoders_reach_are_refused(self):
        long = "wound " * 100
        with pytest.raises(BuilderError, match="I and P apart"):
            encode_prompts(tiny_pipeline(), {"I": long + "inflammatory", "P": long + "proliferative"}, "")

    def test_one_prompt_for_two_phases_is_the_users_choice(self):
        embeddings = encode_prompts(tiny_pipeline(), {"I": "wound", "P": "wound"}, "")
        assert torch.equal(embeddings.positive["I"].hidden, embeddings.positive["P"].hidden)
