"""A student's size and noise levels -> a workflow that ComfyUI opens as it is, with nodes of its own only. No torch.

The levels stand in a ManualSigmas node, because no scheduler of ComfyUI has exactly those of the training. A student
has no guidance to add: BasicGuider evaluates it once a step, as a guidance of 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .comfyui import AUTOENCODERS, TEXT_ENCODER, ModelFile

FEW_STEP_SAMPLER, BASE_SAMPLER = "euler", "uni_pc_bh2"  # of ComfyUI; diffusers' UniPC is of kind bh2
FORMAT_VERSION = 0.4  # of ComfyUI's workflow files
COLUMN, ROW = 360, 160  # pixels between nodes on the canvas
NODE_SIZE = [320, 120]


class Drawing(NamedTuple):
    """The settings of an image: `levels` of the noise from about 1 to 0, one more than steps."""

    width: int
    height: int
    levels: Sequence[float]
    prompt: str
    is_few_step: bool


class Node(NamedTuple):
    """A node of a workflow; `inputs` are {input: (type, name of the node it comes from)}, `widgets` in its order."""

    kind: str
    inputs: Mapping[str, tuple[str, str]]
    outputs: Sequence[str]
    widgets: Sequence[Any]
    column: int
    models: Sequence[ModelFile] = ()


def make_workflow(student: str, num_channels: int, drawing: Drawing, note: str) -> dict[str, Any]:
    """Return a workflow for the file name `student` in ComfyUI's models/diffusion_models, as JSON."""
    nodes = _nodes(student, num_channels, drawing)
    ids = {name: number for number, name in enumerate(nodes, start=1)}
    links: list[list[Any]] = []  # link, from node, from output, to node, to input, type
    for name, node in nodes.items():
        for slot, (kind, source) in enumerate(node.inputs.values()):
            output = nodes[source].outputs.index(kind)
            links.append([len(links) + 1, ids[source], output, ids[name], slot, kind])
    written = [_write_node(ids[name], node, links, _row(nodes, name)) for name, node in nodes.items()]
    written.append(_write_note(len(written) + 1, note))
    return {
        "last_node_id": len(written),
        "last_link_id": len(links),
        "nodes": written,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": FORMAT_VERSION,
    }


def _nodes(student: str, num_channels: int, drawing: Drawing) -> dict[str, Node]:
    autoencoder = AUTOENCODERS[num_channels]
    levels = ", ".join(map(format_level, drawing.levels))
    sampler = FEW_STEP_SAMPLER if drawing.is_few_step else BASE_SAMPLER
    size = [drawing.width, drawing.height, 1, 1]  # one frame, one image
    is_small = num_channels == 16
    latent = "EmptyHunyuanLatentVideo" if is_small else "Wan22ImageToVideoLatent"
    return {
        "student": Node("UNETLoader", {}, ["MODEL"], [student, "default"], 0),
        "text encoder": Node(
            "CLIPLoader", {}, ["CLIP"], [TEXT_ENCODER.name, "wan", "default"], 0, [TEXT_ENCODER]
        ),
        "autoencoder": Node("VAELoader", {}, ["VAE"], [autoencoder.name], 0, [autoencoder]),
        "prompt": Node(
            "CLIPTextEncode", {"clip": ("CLIP", "text encoder")}, ["CONDITIONING"], [drawing.prompt], 1
        ),
        "latents": Node(latent, {} if is_small else {"vae": ("VAE", "autoencoder")}, ["LATENT"], size, 1),
        "noise": Node("RandomNoise", {}, ["NOISE"], [0, "randomize"], 1),
        "sampler": Node("KSamplerSelect", {}, ["SAMPLER"], [sampler], 1),
        "levels": Node("ManualSigmas", {}, ["SIGMAS"], [levels], 1),
        "guider": Node(
            "BasicGuider",
            {"model": ("MODEL", "student"), "conditioning": ("CONDITIONING", "prompt")},
            ["GUIDER"],
            [],
            2,
        ),
        "solve": Node(
            "SamplerCustomAdvanced",
            {
                "noise": ("NOISE", "noise"),
                "guider": ("GUIDER", "guider"),
                "sampler": ("SAMPLER", "sampler"),
                "sigmas": ("SIGMAS", "levels"),
                "latent_image": ("LATENT", "latents"),
            },
            ["LATENT", "LATENT"],
            [],
            2,
        ),
        "image": Node(
            "VAEDecode", {"samples": ("LATENT", "solve"), "vae": ("VAE", "autoencoder")}, ["IMAGE"], [], 3
        ),
        "file": Node("SaveImage", {"images": ("IMAGE", "image")}, [], ["wanlite"], 3),
    }


def format_level(level: float) -> str:
    """Write a noise level so that float32 reads it back exactly, without an exponent, which ManualSigmas misreads."""
    return f"{level:.12f}".rstrip("0").rstrip(".")


def _row(nodes: Mapping[str, Node], name: str) -> int:
    return [other for other in nodes if nodes[other].column == nodes[name].column].index(name)


def _write_node(number: int, node: Node, links: Sequence[list[Any]], row: int) -> dict[str, Any]:
    inputs = [
        {"name": name, "type": kind, "link": next(link[0] for link in links if link[3:5] == [number, slot])}
        for slot, (name, (kind, _)) in enumerate(node.inputs.items())
    ]
    outputs = [
        {"name": kind, "type": kind, "links": [link[0] for link in links if link[1:3] == [number, slot]]}
        for slot, kind in enumerate(node.outputs)
    ]
    properties: dict[str, Any] = {"Node name for S&R": node.kind}
    if node.models:
        properties["models"] = [
            {"name": each.name, "url": each.url, "directory": each.folder} for each in node.models
        ]
    return _place(number, node.kind, node.column, row) | {
        "inputs": inputs,
        "outputs": outputs,
        "properties": properties,
        "widgets_values": list(node.widgets),
    }


def _write_note(number: int, text: str) -> dict[str, Any]:
    empty = {"inputs": [], "outputs": [], "properties": {}, "widgets_values": [text]}
    return _place(number, "Note", 0, 3) | empty


def _place(number: int, kind: str, column: int, row: int) -> dict[str, Any]:
    position = [column * COLUMN, row * ROW]
    return {
        "id": number,
        "type": kind,
        "pos": position,
        "size": NODE_SIZE,
        "flags": {},
        "order": number - 1,
        "mode": 0,
    }
