import pytest

from sae_zoo.config import compose_config
from sae_zoo.records import write_record
from sae_zoo.running.job import run_job
from sae_zoo.running.settings import TrainSettings

SMALL = ["data.n_tokens={train: 6000, validation: 2000, test: 2000}", "d_sae=512", "recipe.n_steps=60",
         "recipe.batch_size=256", "evaluation.n_lm_tokens=512", "trainer.progress_bar=false"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A sweep folder with real runs on the built-in language model, ``topk`` and ``jumprelu``, trained for seconds."""
    root = tmp_path_factory.mktemp("outputs")
    for sae in ("topk", "jumprelu"):
        folder = root / "runs" / "demo" / sae
        folder.mkdir(parents=True)
        config = compose_config("train", [f"sae={sae}", "l0_target=10", f"output_dir={root}", *SMALL])
        run_job(TrainSettings.of(config), folder)
    return root / "runs" / "demo"


@pytest.fixture
def sweep(tmp_path):
    """Writes records into a sweep folder, one job each, latents.csv beside those that have frequencies."""

    def write(*records, name="sweep"):
        for i, values in enumerate(records):
            values = dict(values)
            frequencies = values.pop("frequencies", None)
            write_record(tmp_path / name / f"job{i:03d}", values)
            if frequencies is not None:
                rows = [f"{j},{frequency:.6g},1.0,2.0\n" for j, frequency in enumerate(frequencies)]
                (tmp_path / name / f"job{i:03d}" / "latents.csv").write_text(
                    "latent,frequency,mean_active_value,max_value\n" + "".join(rows))
        return tmp_path / name

    return write
