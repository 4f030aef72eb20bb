import pytest

from sae_zoo.records import write_record


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
