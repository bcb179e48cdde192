"""The code on the pages for users runs, with a small pipeline of random weights in place of a published one."""

import os
import re
import shlex
from pathlib import Path

import diffusers
import pytest
import torch
from small_pipelines import PIPELINES
from test_every_pipeline import save_adapter

import ditq_kernels as ditq
from ditq_kernels import cli

PAGES = sorted((Path(__file__).parent.parent / "docs" / "guides").glob("*.md"))
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What a page says, and what stands for it here: a model from the hub, a GPU, sizes and a compiler that take their time.
SMALLER = {
    "black-forest-labs/FLUX.1-dev": "published",
    "num_inference_steps=28": "num_inference_steps=2, height=32, width=32",
    "--steps 28": "--steps 2 --height 32 --width 32",
    "_g128": "_g32",
    '"cuda"': '"cpu"',
    "fullgraph=True": 'fullgraph=True, backend="eager"',
    "--moments": "--moments --samples 2",
}


def smaller(code: str) -> str:
    for said, here in SMALLER.items():
        code = code.replace(said, here)
    return code


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A directory with what the pages take for granted."""
    monkeypatch.chdir(tmp_path)
    pipe = next(entry for entry in PIPELINES if entry.name == "flux").build(0)
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae):
        part.to(torch.bfloat16)
    pipe.save_pretrained("published")
    save_adapter(pipe, "my-lora")
    ditq.save(ditq.quantize(pipe, "w4a8_g32", progress=False), "flux-w4a8")
    Path("prompts.txt").write_text("a street in the rain\nan otter\n")
    # The one call that diffusers refuses without a GPU.
    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_model_cpu_offload", lambda pipe: pipe.to("cpu"))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore")
def test_the_code_of_a_page_runs(page, places, capsys):
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    if page.stem == "flux":
        os.rename("flux-w4a8", "another")  # the page writes it
    names: dict = {}
    for language, code in blocks:
        code = smaller(code)
        if language == "python":
            exec(compile(code, page.name, "exec"), names)
            continue
        for line in code.splitlines():
            command, *arguments = shlex.split(line)
            assert command == "ditq" and cli.main(arguments) == 0, capsys.readouterr().err
    for picture in (value for name, value in names.items() if name == "picture"):
        assert picture.size == (32, 32)


def test_every_page_is_linked_from_the_readme():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert [page.name for page in PAGES if f"docs/guides/{page.name}" not in readme] == []
