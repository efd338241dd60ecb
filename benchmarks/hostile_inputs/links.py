"""Links and names that lead out of a folder: refused, or skipped among images."""

import json
import shutil
import tarfile

from safetensors import safe_open

from benchmarks.hostile_inputs.builders import (
    SETTINGS,
    TOKENIZER,
    captioned,
    link_out,
    save_image,
    several,
    unseal,
)
from benchmarks.hostile_inputs.trial import ACCEPTED, REFUSED, WEIGHTS, Input, call, draw, plan
from train_distillation import WanLiteStudent
from wanlite import WanLitePipeline


def links_out() -> list[Input]:
    kind = "links and names out"

    def index_out(name):
        def prepare(place):
            path = place.student / "text_encoder/model.safetensors"
            shutil.move(path, place.outside / "x.safetensors")
            with safe_open(place.outside / "x.safetensors", "np") as file:
                weight_map = dict.fromkeys(file.keys(), name.format(outside=place.outside))
            (path.parent / f"{path.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
            unseal(path)

        return prepare

    def folder_out(name):
        def prepare(place):
            shutil.move(place.student / name, place.outside / name)
            (place.student / name).symlink_to(f"../outside/{name}")

        return prepare

    def manifest_out(place):
        (place.outside / "secret").write_text("a secret")
        path = place.student / "vae/manifest.json"
        content = json.loads(path.read_text())
        content["files"]["../../outside/secret"] = {"size": 8}
        path.write_text(json.dumps(content))

    def loop(place):
        path = place.student / TOKENIZER
        path.unlink()
        path.symlink_to("tokenizer.json")

    def photos_out(change):
        def prepare(place):
            folder = captioned(place)
            change(folder, place.outside)
            return ["--images", folder, "--num_images", 2]

        return prepare

    def caption_out(folder, outside):
        (outside / "secret.txt").write_text("a secret")
        (folder / "a.txt").unlink()
        (folder / "a.txt").symlink_to("../../outside/secret.txt")

    def metadata_out(folder, outside):
        save_image(outside / "secret.png")
        rows = [
            {"file_name": "../../outside/secret.png", "text": "a"},
            {"file_name": str(outside / "secret.png"), "text": "b"},
        ]
        rows += [{"file_name": f"{name}.png", "text": name} for name in "abc"]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def tar_out(folder, outside):
        save_image(outside / "secret.png")
        with tarfile.open(folder / "x.tar", "w") as tar:
            for name in ("a.png", "a.txt", "b.png", "b.txt"):
                tar.add(folder / name, name)
            for number, target in enumerate((f"{outside}/secret.png", "../../outside/secret.png")):
                entry = tarfile.TarInfo(f"link{number}.png")
                entry.type, entry.linkname = tarfile.SYMTYPE, target
                tar.addfile(entry)

    pipeline = call(lambda place: WanLitePipeline.from_pretrained(place.student))
    student = call(lambda place: WanLiteStudent.from_pretrained(place.student))
    rows = [
        ("run.json is a link", REFUSED, link_out("run.json"), draw),
        ("an index of the text encoder", REFUSED, index_out("../../outside/x.safetensors"), draw),
        ("a caption is a link", ACCEPTED, photos_out(caption_out), plan),
        ("an index with an absolute name", REFUSED, index_out("{outside}/x.safetensors"), draw),
        (
            "an index with a name in another folder",
            REFUSED,
            index_out("../vae/../../outside/x.safetensors"),
            pipeline,
        ),
        ("the tokenizer is a link", REFUSED, link_out(TOKENIZER, True), draw),
        ("the scheduler is a link", REFUSED, link_out(SETTINGS), draw),
        ("the config of a pipeline is a link", REFUSED, link_out("config.json", True), pipeline),
        ("the weights of a student are a link", REFUSED, link_out(WEIGHTS), student),
        ("the folder of the autoencoder is a link", REFUSED, folder_out("vae"), draw),
        ("the folder of the scheduler is a link", REFUSED, folder_out("scheduler"), pipeline),
        ("model_index.json is a link", ACCEPTED, link_out("model_index.json"), pipeline),
        ("added_tokens.json is a link", REFUSED, link_out("tokenizer/added_tokens.json"), draw),
        ("a chat template is a link", REFUSED, link_out("tokenizer/chat_template.jinja"), draw),
        (
            "a template in a folder is a link",
            REFUSED,
            several(
                lambda place: (place.student / "tokenizer/additional_chat_templates").mkdir(),
                link_out("tokenizer/additional_chat_templates/a.jinja"),
            ),
            draw,
        ),
        ("a manifest names a file outside", REFUSED, manifest_out, draw),
        ("a loop of links", REFUSED, loop, draw),
        (
            "a link through /proc",
            REFUSED,
            several(
                lambda place: shutil.move(place.student / SETTINGS, place.outside / "s"),
                lambda place: (place.student / SETTINGS).symlink_to(f"/proc/self/root{place.outside}/s"),
            ),
            draw,
        ),
        ("rows of metadata lead out", ACCEPTED, photos_out(metadata_out), plan),
        ("links in a tar", ACCEPTED, photos_out(tar_out), plan),
    ]
    return [Input(kind, *row) for row in rows]
