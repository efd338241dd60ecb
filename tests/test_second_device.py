"""Nothing of a run stays on the CPU by mistake: three stages, images, drawing, on a device that refuses to be mixed with it."""

import subprocess
import sys

import numpy as np
import pytest
from torch.utils import backend_registration

from run_inference import Painter
from tests.conftest import ROOT
from tests.test_images import write_folder
from wanlite.run_folder import read_run

pytestmark = pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
                                reason="this torch takes no device that is written in Python")
STAGES = ["--num_trajectories=16", "--num_held_out=6", "--train_batch_size=8", "--max_train_steps=6", "--segment_steps=2",
          "--matching_steps=2", "--validation_steps=3", "--validation_walks=4", "--own_path_pictures=8", "--teacher_steps=4",
          "--aspect_ratios", "1:1", "3:2"]
PROMPTS = ["a small red ring on a white background", "a large blue cross on a grey background"]
DRAWS = f"""import sys
sys.path.insert(0, "{{root}}")
import numpy
from run_inference import Painter
numpy.save("{{path}}", Painter("{{run}}", "second:0").draw({PROMPTS}, range(2), 4, 64, 96))
"""


def on_second_device(*words):
    return subprocess.run([sys.executable, ROOT / "tests" / "second_device.py", *words], capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("second")
    write_folder(folder / "images")
    said = on_second_device(ROOT / "train_distillation.py", f"--output_dir={folder / 'run'}", f"--images={folder / 'images'}",
                            *STAGES)
    assert said.returncode == 0, said.stderr[-3000:]
    assert "device   second:0" in said.stdout
    return folder / "run"


def test_every_stage_trains_on_one_device(run):
    assert read_run(run)["steps"] == 6


def test_a_student_draws_there_what_it_draws_on_the_cpu(run, tmp_path):
    script = tmp_path / "draws.py"
    script.write_text(DRAWS.format(root=str(ROOT), run=str(run), path=str(tmp_path / "drawn.npy")))
    said = on_second_device(script)
    assert said.returncode == 0, said.stderr[-3000:]
    drawn = Painter(run, "cpu").draw(PROMPTS, range(2), 4, 64, 96)
    assert np.abs(np.load(tmp_path / "drawn.npy").astype(int) - drawn).max() <= 1


def test_what_is_mixed_is_refused(tmp_path):
    script = tmp_path / "mixes.py"
    script.write_text("import torch\ntorch.zeros(2, device='second:0') + torch.zeros(2)\n")
    said = on_second_device(script)
    assert "Expected all tensors to be on the same device" in said.stderr
