"""Run an exported student in ComfyUI's own code and compare it with the student in diffusers.

    git clone https://github.com/comfyanonymous/ComfyUI && pip install -r ComfyUI/requirements.txt
    python benchmarks/comfyui.py --comfyui ComfyUI [--model outputs/wan_t2i]

Prints, by dtype of the file: keys that ComfyUI misses or does not use; the largest difference of the velocity; that
of the final latents of the workflow's own nodes, to Euler steps at the same levels and to diffusers, whose scheduler
truncates timesteps to whole numbers; and the errors that ComfyUI's validation finds in the workflow. Without --model,
a small few-step student of random weights is exported. Runs on the CPU. Exit code 1 if a check fails.
"""

import argparse
import asyncio
import importlib
import importlib.machinery
import json
import logging
import subprocess
import sys
import types
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from train_distillation import WanLiteStudent
from wanlite.export.__main__ import levels_of
from wanlite.export.comfyui import DTYPES, TEXT_DIM
from wanlite.flow import make_scheduler, sample, seeded_noise
from wanlite.schedule import read_schedule
from wanlite.training.run_folder import read_run

# Packages of other models' nodes, which ComfyUI imports at its start.
OPTIONAL = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchaudio")
EXTRAS = ("custom_sampler", "hunyuan", "wan")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
TEXT_LENGTH, NUM_TOKENS = 512, 9  # ComfyUI pads prompts with zeros to 512 tokens, as Wan does
MAX_DIFFERENCE = 1e-4  # in float32, of the velocity and of the solve; for other dtypes it is printed only


class Placeholder(types.ModuleType):
    """An optional package that is missing: each of its attributes is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def start_comfyui(folder):
    """Put ComfyUI on the path, on the CPU and in float32, and import its nodes."""
    for name in OPTIONAL:
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError):
            sys.modules[name] = Placeholder(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.path.insert(0, str(folder.resolve()))
    sys.argv = ["main.py", "--cpu", "--fp32-unet"]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("comfy.utils").set_progress_bar_enabled(False)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.ERROR)
    nodes = importlib.import_module("nodes")
    for name in EXTRAS:
        module = importlib.import_module(f"comfy_extras.nodes_{name}")
        nodes.NODE_CLASS_MAPPINGS.update(getattr(module, "NODE_CLASS_MAPPINGS", {}))
        if hasattr(module, "comfy_entrypoint"):
            listed = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
            nodes.NODE_CLASS_MAPPINGS.update({node.GET_SCHEMA().node_id: node for node in listed})
    return nodes


def make_student(folder):
    """Save a small student of random weights with heads of 128, as a run of few steps."""
    torch.manual_seed(0)
    student = WanLiteStudent(hidden_size=256, depth=2, num_heads=2)
    for weight in student.parameters():
        torch.nn.init.normal_(weight, std=0.05 if weight.ndim > 1 else 0.2)
    student.save_pretrained(folder)
    make_scheduler(3.0, (4, 2, 1)).save_pretrained(folder / "scheduler")
    run = {
        "schedule": {"few_steps": [4, 2, 1], "flow_shift": 3.0},
        "resolution": 128,
        "num_inference_steps": 4,
        "validation_prompts": ["a red kite"],
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def export(model, models, dtype):
    """Export into ComfyUI's folders `models`; returns the paths of the weights and of the workflow."""
    output = models / "diffusion_models" / f"student-{dtype}.safetensors"
    command = (sys.executable, "-m", "wanlite.export", model, "--output", output, "--dtype", dtype)
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return output, output.with_suffix(".json")


def load(nodes, path):
    """Return ComfyUI's model of a file, and the keys that it misses or does not use."""
    messages = []

    class Collector(logging.Handler):
        def emit(self, record):
            text = record.getMessage()
            if any(word in text for word in ("missing", "unexpected", "left over")) and "[]" not in text:
                messages.append(text)

    logger = logging.getLogger()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler := Collector())
    (model,) = nodes.NODE_CLASS_MAPPINGS["UNETLoader"]().load_unet(path.name, "default")
    logger.removeHandler(handler)
    return model, messages


def to_prompt(workflow, classes):
    """Return the workflow in the form that ComfyUI's server runs, by the definitions of its nodes."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] == "Note":  # of the browser only
            continue
        defined = classes[node["type"]].INPUT_TYPES()
        inputs = {each["name"]: links[each["link"]] for each in node["inputs"]}
        values = iter(node["widgets_values"])
        for name, spec in {**defined.get("required", {}), **defined.get("optional", {})}.items():
            options = spec[1] if len(spec) > 1 else {}
            if name in inputs or not (isinstance(spec[0], list) or spec[0] in WIDGETS):
                continue
            inputs[name] = next(values)
            if options.get("control_after_generate"):
                next(values)
        if list(values):
            raise ValueError(f"{node['type']}: has more values than widgets")
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def validate(prompt):
    """Return the errors that ComfyUI's server would answer with."""
    execution = importlib.import_module("execution")
    is_valid, error, _, node_errors = asyncio.run(execution.validate_prompt("1", prompt, None))
    return [] if is_valid and not node_errors else [error, *node_errors.values()]


def call(classes, kind, **inputs):
    """Run a node and return its first output."""
    node = classes[kind]
    found = getattr(node(), node.FUNCTION)(**inputs)
    return found[0]


def solve_in_comfyui(classes, model, prompt, noise, text):
    """Return the final latents (B, C, H, W), normalised, of the workflow's nodes from `noise` and `text`."""
    nodes = {node["class_type"]: node["inputs"] for node in prompt.values()}
    latent = {"samples": torch.zeros_like(noise.unsqueeze(2))}
    solved = call(
        classes,
        "SamplerCustomAdvanced",
        noise=types.SimpleNamespace(seed=0, generate_noise=lambda _: noise.unsqueeze(2)),
        guider=call(classes, "BasicGuider", model=model, conditioning=[[text, {}]]),
        sampler=call(classes, "KSamplerSelect", **nodes["KSamplerSelect"]),
        sigmas=call(classes, "ManualSigmas", **nodes["ManualSigmas"]),
        latent_image=latent,
    )
    return model.model.process_latent_in(solved["samples"]).squeeze(2)


def solve_by_euler(student, levels, noise, text):
    """Return the latents of Euler steps at fractional timesteps, as ComfyUI takes them."""
    latents = levels[0] * noise
    for level, following in zip(levels, levels[1:]):
        timestep = torch.full((len(noise),), 1000 * level)
        latents = latents + (following - level) * student(latents, timestep, text).sample
    return latents


def solve_in_diffusers(student, model_folder, steps, noise, text):
    """Return the latents of the student's own scheduler."""
    schedule = read_schedule(model_folder, read_run(model_folder).get("schedule") or {})
    scheduler = make_scheduler(3.0).from_config(schedule)
    return sample(lambda latents, timestep: student(latents, timestep, text).sample, noise, scheduler, steps)


@torch.no_grad()
def compare(nodes, model_folder, models, dtype):
    """Print the row of a dtype; returns whether its checks hold."""
    weights, workflow = export(model_folder, models, dtype)
    model, messages = load(nodes, weights)
    student = WanLiteStudent.from_pretrained(model_folder)
    run = read_run(model_folder)
    steps = run["num_inference_steps"]
    noise = seeded_noise((student.config.num_channels, 8, 8), [0, 1])
    text = torch.zeros(2, TEXT_LENGTH, TEXT_DIM)
    text[:, :NUM_TOKENS] = seeded_noise((NUM_TOKENS, TEXT_DIM), [2, 3])
    timestep = torch.tensor([900.0, 300.0])
    prompt = to_prompt(json.loads(workflow.read_text()), nodes.NODE_CLASS_MAPPINGS)
    network = model.model.diffusion_model
    velocities = (
        network(noise.unsqueeze(2), timestep, context=text).squeeze(2),
        student(noise, timestep, text).sample,
    )
    found = solve_in_comfyui(nodes.NODE_CLASS_MAPPINGS, model, prompt, noise, text)
    levels = levels_of(Path(model_folder), run, [steps])[steps]
    rows = {
        "velocity": velocities,
        f"Euler, {steps} steps": (found, solve_by_euler(student, levels, noise, text)),
        "diffusers": (found, solve_in_diffusers(student, model_folder, steps, noise, text)),
    }
    differences = {name: (ours - theirs).abs().max().item() for name, (theirs, ours) in rows.items()}
    errors = validate(prompt)
    print(
        f"{dtype:9} {weights.stat().st_size / 1e6:8,.1f} MB  {network.num_heads} heads of "
        f"{network.dim // network.num_heads}  unmatched keys: {messages or 'none'}  workflow: {errors or 'valid'}"
    )
    for name, difference in differences.items():
        print(
            f"    {name:16} differs by {difference:.1e} (largest value {rows[name][1].abs().max():.2f})",
            flush=True,
        )
    checked = ["velocity"] if not run["schedule"].get("few_steps") else list(rows)[:2]
    is_equal = all(differences[name] <= MAX_DIFFERENCE for name in checked)
    return not messages and not errors and (is_equal or dtype != "float32")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of ComfyUI")
    parser.add_argument("--model", type=Path, help="a saved student (default: a small one of random weights)")
    arguments = parser.parse_args()
    nodes = start_comfyui(arguments.comfyui)
    print(f"ComfyUI {importlib.import_module('comfyui_version').__version__}")
    with TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        folders = importlib.import_module("folder_paths")
        for kind in ("diffusion_models", "text_encoders", "vae"):
            (models / kind).mkdir(parents=True)
            folders.add_model_folder_path(kind, str(models / kind), is_default=True)
        for name in ("text_encoders/umt5_xxl_fp8_e4m3fn_scaled", "vae/wan_2.1_vae", "vae/wan2.2_vae"):
            (models / f"{name}.safetensors").touch()  # validation looks for their names only
        model = arguments.model or make_student(Path(folder) / "student")
        held = [compare(nodes, model, models, dtype) for dtype in DTYPES]
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
