"""--push_to_hub against a local hub: the uploaded files, and the errors of a hub that refuses."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.conftest import ROOT, SHORT_RUN, run_script
from tests.test_announcements import parse_in_a_shell
from wanlite.training.publishing import upload_command

TRAIN = ROOT / "train_distillation.py"


class Hub(BaseHTTPRequestHandler):
    """Accepts a repository and a commit, whose files it keeps in `files`; answers from `status` on if that is set."""

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        self.requested.append(path)
        if path == "/api/repos/create":
            answer = {"url": f"{self.address}/me/student", "name": "me/student"}
        elif path.endswith("/preupload/main"):
            files = json.loads(content)["files"]
            answer = {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for file in files
                ]
            }
        elif path.endswith("/commit/main"):
            for line in content.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            answer = {
                "commitUrl": f"{self.address}/me/student/commit/0",
                "commitOid": "0" * 40,
                "success": True,
            }
        else:  # the check of the model card's header
            answer = {"errors": [], "warnings": []}
        self.answer(self.refused.get(path.rpartition("/")[2], 200), answer)

    def do_GET(self):
        self.requested.append(self.path)
        model = {"id": "me/student", "sha": "0" * 40, "siblings": []}
        self.answer(self.refused.get("info", 200), [] if "/tree/" in self.path else model)

    def answer(self, status, content):
        if status is None:  # the connection breaks
            self.close_connection = True
            return
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    """A local hub; its `environment` is that of a process that uses it."""

    class Here(Hub):
        files, requested, refused = {}, [], {}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Here)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Here.address = f"http://127.0.0.1:{server.server_port}"
    Here.environment = {
        "HF_ENDPOINT": Here.address,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_token",
        "no_proxy": "*",
    }
    yield Here
    server.shutdown(), thread.join(), server.server_close()


def push(hub, folder, *flags):
    arguments = ("--output_dir", folder, *SHORT_RUN, "--push_to_hub", "me/student", *flags)
    return run_script(TRAIN, *arguments, environment=hub.environment)


def test_a_run_uploads_what_inference_needs(hub, tmp_path):
    process = push(hub, tmp_path / "run", "--project_only")
    assert process.returncode == 0, process.stderr
    assert f"uploaded to {hub.address}/me/student" in process.stdout
    assert hub.requested[0] == "/api/repos/create"
    assert {"config.json", "README.md", "run.json", "model_index.json"} < hub.files.keys()
    assert {
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    } < hub.files.keys()
    assert not any(name.startswith(("cache", "checkpoints", "logs", ".")) for name in hub.files)
    weights = "diffusion_pytorch_model.safetensors"
    assert hub.files[weights] == (tmp_path / "run" / weights).read_bytes()


def test_an_upload_names_no_path_of_the_machine(hub, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red ring at the left on a white background\n" * 3)
    process = push(hub, tmp_path / "run", "--project_only", "--prompts", prompts)
    assert process.returncode == 0, process.stderr
    texts = {name: content for name, content in hub.files.items() if not name.endswith(".safetensors")}
    for private in (str(tmp_path), str(ROOT)):
        found = {name: content.find(private.encode()) for name, content in texts.items()}
        assert set(found.values()) == {-1}, found
    assert json.loads(texts["run.json"])["settings"]["prompts"] == "prompts.txt"
    assert "WanPipeline.from_pretrained('me/student')" in texts["README.md"].decode()
    assert str(tmp_path) in (tmp_path / "run/run.json").read_text()
    assert not (tmp_path / "run/.published").exists()


def test_a_hub_that_refuses_the_name_ends_a_run_before_it_begins(hub, tmp_path):
    hub.refused |= {"create": 403, "info": 404}
    process = push(hub, tmp_path / "run")
    assert process.returncode == 2 and process.stdout == "" and not (tmp_path / "run").exists()
    assert "--push_to_hub me/student: the hub refuses it" in process.stderr
    assert len(process.stderr.splitlines()) == 1 and "hf auth login" in process.stderr


def test_a_hub_out_of_reach_ends_a_run_before_it_begins(hub, tmp_path):
    hub.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    process = push(hub, tmp_path / "run")
    assert process.returncode == 2 and process.stdout == "" and not (tmp_path / "run").exists()
    assert "--push_to_hub me/student: the hub cannot be reached (" in process.stderr
    assert len(process.stderr.splitlines()) == 1 and "hf upload" in process.stderr


@pytest.mark.parametrize("status", [403, None])
def test_an_upload_that_fails_leaves_a_saved_student_and_the_command(status, hub, tmp_path):
    hub.refused["main"] = status
    process = push(hub, tmp_path / "run", "--project_only")
    assert process.returncode == 0 and "Traceback" not in process.stderr
    assert "WARNING   not uploaded (" in process.stdout
    assert upload_command(tmp_path / "run", "me/student") in process.stdout
    assert (tmp_path / "run/.published/config.json").is_file()


def test_a_dry_run_touches_no_hub(hub, tmp_path):
    process = push(hub, tmp_path / "run", "--dry_run")
    assert process.returncode == 0 and hub.requested == []


@pytest.mark.parametrize("folder", ["out", "out dir", "it's"])
def test_the_command_that_uploads_is_quoted(folder):
    command = upload_command(folder, "me/student").replace("hf", "python", 1)
    assert parse_in_a_shell(command) == ["upload", "me/student", f"{folder}/.published"]
