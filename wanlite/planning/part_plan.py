"""Settings and a teacher's configs -> the small parts of a run: sizes, steps, operations, memory and disk.

Nothing is loaded: networks have no contents. Legend: C channels, H W latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from ..data.autoencoder import use_single_frame_path
from ..data.text_encoder import load_tokenizer
from ..files.file_names import CONFIG
from ..files.json_files import DOWNLOADED, read_json
from ..network import TEXT_LENGTH
from ..parts.decoder import CROP, decode_frames, image_loss
from ..parts.decoder_projection import check_width, widest
from ..parts.loop import KEPT_CHECKPOINTS
from ..parts.making import VALIDATED_IMAGES, count_parameters
from ..parts.options import PartOptions, choose_options, empty_autoencoder
from ..parts.text_encoder import count_states
from ..parts.text_projection import check_shape, make_small
from ..parts.vocabulary import Vocabulary, choose_vocabulary, read_vocabulary
from ..phases import list_part_phases
from ..teacher.text_encoder import convert_tokenizer
from .defaults import choose_prompts
from .disk import TOKENS_PER_WORD, format_size

# The text encoder of every Wan; official files have no config.
UMT5_XXL: dict[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
# Operations of bfloat16 that an H100 computes in the time of one in another precision.
FLOAT32_COST = 15
TF32_COST = 2  # that of convolutions
COPIES = 4  # weights, average, and the state of the optimizers, in a checkpoint


@dataclass(frozen=True)
class PartPlan:
    """The small parts that a run makes after its training, and the teacher's, all without contents."""

    options: PartOptions
    encoder: Any
    small_encoder: Any  # None: the text encoder stays
    autoencoder: Any
    small_autoencoder: Any  # None: the decoder stays
    vocabulary: Vocabulary | None = None  # None: all words stay

    @property
    def phases(self) -> list[str]:
        return list_part_phases(self.small_encoder is not None, self.small_autoencoder is not None)

    def count_bytes(self, student_parameters: int) -> int:
        """Return the bytes of the folder with small parts in bfloat16."""
        encoder = self.count_text_parameters() if self.small_encoder else count_parameters(self.encoder)
        decoder = count_parameters(self.small_autoencoder or self.autoencoder)
        return 2 * (student_parameters + encoder + decoder)

    def count_text_parameters(self) -> int:
        """Return the parameters of the small text encoder as it is saved; all words stay while it is trained."""
        count, shared = count_parameters(self.small_encoder), self.small_encoder.shared
        if self.vocabulary is None:
            return count
        return count - (shared.num_embeddings - len(self.vocabulary.kept)) * shared.embedding_dim

    def count_disk_bytes(self, student: Any, latent_shape: tuple[int, ...]) -> int:
        """Return the bytes of the folder, and of the latents and checkpoints until it is complete."""
        num_values = (
            torch.Size(latent_shape).numel() + 4 * latent_shape[0]
        )  # int8, and a scale for each channel
        drawn = (self.options.num_images + VALIDATED_IMAGES) * num_values
        trained = [self.small_encoder, self.small_autoencoder and self.small_autoencoder.decoder]
        phases = zip((2, 1), trained)  # the text encoder is trained in two
        checkpoints = sum(count * 4 * COPIES * count_parameters(each) for count, each in phases if each)
        folder = self.count_bytes(student.num_parameters()) + 2 * student.num_parameters()  # in float32
        return folder + drawn + (KEPT_CHECKPOINTS + 1) * checkpoints

    def describe(self, student: Any) -> list[str]:
        """Return the lines of the sizes and steps."""
        lines = []
        if shape := self.options.text_shape:
            lines.append(
                f"text encoder: width {shape.width}, {shape.depth} block{'s' * (shape.depth > 1)}, {shape.heads} heads, "
                f"{_compare(self.count_text_parameters(), count_parameters(self.encoder))}"
            )
        if self.vocabulary is not None:
            lines.append(f"vocabulary: {self.vocabulary.describe()}")
        if self.small_autoencoder is not None:
            lines.append(
                f"decoder: {self.options.decoder_base_dim} channels, "
                f"{_compare(*(count_parameters(each.decoder) for each in (self.small_autoencoder, self.autoencoder)))}"
            )
        steps = ", ".join(f"{name} {getattr(self.options, f'{name}_steps'):,}" for name in self.phases)
        return [
            *lines,
            f"steps: {steps}, on {self.options.num_images:,} images of the student",
            f"the folder small/ has {format_size(self.count_bytes(student.num_parameters()))} in bfloat16",
        ]


def _compare(small, large):
    """Return the parameters of a small and of a large part as a clause."""
    sizes = [f"{format_size(2 * each)}" for each in (small, large)]
    counts = [f"{each / 1e6:,.2f} M" for each in (small, large)]
    return f"{counts[0]} parameters of {counts[1]}, {sizes[0]} of {sizes[1]} in bfloat16"


def plan_parts(settings: Any, teacher: Any) -> PartPlan | None:
    """Return the PartPlan of a TeacherFolder, None if no part is small.

    Raises ValueError for impossible sizes, and for a vocabulary that lacks words of the prompts.
    """
    if settings.text_encoder == settings.decoder == "large":
        return None
    encoder_config, config = _encoder_config(teacher.components["text_encoder"]), teacher.autoencoder_config
    options = choose_options(settings, encoder_config, config)
    base_dim, shape = options.decoder_base_dim, options.text_shape
    if base_dim is not None:
        check_width(config, base_dim)
    if shape is not None:
        check_shape(encoder_config, shape)
    vocabulary = _choose_vocabulary(settings, teacher.components)
    with torch.device("meta"):
        return PartPlan(
            options,
            UMT5EncoderModel(encoder_config),
            make_small(encoder_config, shape) if shape is not None else None,
            empty_autoencoder(config, widest(config)),
            empty_autoencoder(config, base_dim) if base_dim is not None else None,
            vocabulary,
        )


def _choose_vocabulary(settings, components):
    """Return the Vocabulary of --vocabulary and of the teacher's tokenizer, None if all words stay."""
    kept = read_vocabulary(settings.vocabulary)
    if not kept:
        return None
    place = components["tokenizer"]  # a folder, or the file of ComfyUI's text encoder
    tokenizer = load_tokenizer(place) if place.is_dir() else convert_tokenizer(place)
    return choose_vocabulary(
        tokenizer, kept, [prompt for each in choose_prompts(settings) for prompt in each]
    )


def _encoder_config(place):
    if place.is_dir():
        return UMT5Config.from_dict(read_json(place / CONFIG, DOWNLOADED))
    return UMT5Config(**UMT5_XXL)


# ---- operations --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartWork:
    """The work of a PartPlan, with the student that reads small text and samples in `num_steps`."""

    plan: PartPlan
    student: Any
    latent_shape: tuple[int, int, int]  # of an image
    image_tokens: int
    text_tokens: int  # of the longest prompt in a batch
    num_steps: int

    @cached_property
    def by_phase(self) -> dict[str, dict[int, float]]:
        """{phase: {cost: operations}}; the cost is that of an operation in its precision on a GPU."""
        counts = {
            "decoder": self._count_decoder,
            "reading": self._count_reading,
            "text_velocity": self._count_velocity,
        }
        return {"images": {1: self._count_images()}} | {name: counts[name]() for name in self.plan.phases}

    @property
    def operations(self) -> float:
        return sum(sum(each.values()) for each in self.by_phase.values())

    @property
    def h100_operations(self) -> float:
        """The number of operations in bfloat16 that take as long on an H100."""
        return sum(cost * count for each in self.by_phase.values() for cost, count in each.items())

    def _count_images(self):
        num_passes = self.num_steps * (self.plan.options.num_images + VALIDATED_IMAGES)
        return 2 * num_passes * self._student_products()

    def _student_products(self):
        """Return the products in a pass of the student."""
        return self.image_tokens * self.student.num_parameters()

    def _count_decoder(self):
        options, size = self.plan.options, [min(CROP, side) for side in self.latent_shape[1:]]
        large, small = (
            count_decoding(each, size) for each in (self.plan.autoencoder, self.plan.small_autoencoder)
        )
        return {TF32_COST: options.decoder_steps * options.decoder_batch * (large + 3 * small)}

    def _count_reading(self):
        return self._count_text(self.plan.options.reading_steps * self.plan.options.text_batch)

    def _count_text(self, num_prompts):
        """Return the operations of the large encoder, and of training the small one."""
        large, small = (
            num_prompts * self.text_tokens * (count_parameters(each) - count_parameters(each.shared))
            for each in (self.plan.encoder, self.plan.small_encoder)
        )
        return {1: 2 * large, FLOAT32_COST: 6 * small}

    def _count_velocity(self):
        """Return the operations of the student with both texts, and of reading."""
        options = self.plan.options
        num_states = count_states(self.student.config, self.latent_shape, options.text_batch)
        counts = self._count_text(options.text_velocity_steps * (num_states + options.text_batch))
        counts[1] += 6 * options.text_velocity_steps * num_states * self._student_products()
        return counts


def count_decoding(autoencoder: Any, size: list[int]) -> int:
    """Return the operations of decoding latents of a size (H, W) with an autoencoder on the meta device."""
    latents = torch.zeros(1, autoencoder.config.z_dim, *size, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decode_frames(use_single_frame_path(autoencoder), latents)
    return counter.get_total_flops()


def longest_in_batch(prompts: list[str], batch_size: int) -> int:
    """Return the tokens of the longest prompt in a batch, from its words: one prompt in `batch_size` is longer."""
    lengths = sorted(1 + round(TOKENS_PER_WORD * len(prompt.split())) for prompt in prompts)
    return min(TEXT_LENGTH, lengths[-1 - len(lengths) // batch_size])


# ---- memory ------------------------------------------------------------------------------------------------


def count_decoder_bytes(plan: PartPlan, peak: Callable[[Callable], int]) -> int:
    """Return the bytes of training the small decoder, with its optimizers."""
    configs = [{**each.config} for each in (plan.autoencoder, plan.small_autoencoder)]

    def run_step():
        large, small = (use_single_frame_path(AutoencoderKLWan.from_config(each)) for each in configs)
        latents = torch.zeros(plan.options.decoder_batch, small.config.z_dim, CROP, CROP)
        with torch.no_grad():
            target = decode_frames(large, latents)
        image_loss(decode_frames(small, latents), target).backward()

    return peak(run_step) + 4 * (COPIES - 1) * count_parameters(plan.small_autoencoder.decoder)
