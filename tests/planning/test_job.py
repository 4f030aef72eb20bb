"""Sums of a job, with rates and a machine that are made up."""

from dataclasses import replace

import pytest

from sae_zoo.data.cache_writer import estimated_bytes
from sae_zoo.planning.job import _FIT_SECONDS, Harvest, Job, Online
from sae_zoo.planning.lm import LMCost
from sae_zoo.planning.machine import Machine, Rates
from sae_zoo.planning.meter import Cost
from sae_zoo.planning.report import Plan, Planned, duration, size, text
from sae_zoo.planning.sae import SAECost

GB = 1_000_000_000
MACHINE = Machine(host_bytes=64 * GB, device_bytes=None, free_disk_bytes=100 * GB, process_bytes=GB // 2,
                  device="made up")
RATES = Rates(encode=1e-9, entry=1e-7, parameter=1e-9, selected=1.0, lm_flop=1e-11, write=2e-9, read=1e-9, digest=1e-9)
HARVEST = Harvest(widths=(512,), n_tokens={"train": 100_000, "validation": 10_000, "test": 10_000}, dtype="float32",
                  rows_per_shard=65536, context_size=128, batch_size=8, cost=Cost(10**11, 10**8), weight_bytes=GB)
LM = LMCost(GB, 512, HARVEST.cost, 9 * 10**10, 2**20, Cost(2 * 10**11, 10**9), Cost(5 * 10**11, 10**9))
SAE = SAECost(batch=1024, d_in=512, d_sae=4096, auxk=True, n_parameters=4_200_000, parameter_bytes=16_800_000,
              state_bytes=16_800_000, whole_products=1, products=5, dense=Cost(10**11, 10**8))
JOB = Job(name="a job", harvest=HARVEST, lm=LM, sae=SAE, entries=40.0, dense=False, starts_dense=False,
          calibrated=False, n_steps=1000, validation_every=50, n_validation_rows=8192, n_rows=10_000, n_lm_tokens=4096,
          devices=1)


def phases(job, machine=MACHINE, rates=RATES):
    return {phase.name: phase for phase in job.phases(machine, rates)}


def test_the_published_size_of_the_activations():
    """8e9 tokens of one site of Gemma 2 9B are about 104 TiB in float32 (Gemma Scope, arXiv 2408.05147)."""
    paper = replace(HARVEST, widths=(3584,), n_tokens={"train": 8_000_000_000, "validation": 0, "test": 0})
    assert paper.activation_bytes / 2**40 == pytest.approx(104, rel=0.01)
    assert replace(paper, dtype="bfloat16").activation_bytes * 2 == paper.activation_bytes


def test_disk_is_what_the_writer_of_caches_asks_for():
    sizes = {"d_in": 512, "dtype": "float32"}
    assert HARVEST.bytes_on_disk(at_peak=True) == estimated_bytes(HARVEST.n_tokens, rows_per_shard=65536, **sizes)
    both = replace(HARVEST, widths=(512, 512))
    assert both.bytes_on_disk(at_peak=True) == 2 * HARVEST.bytes_on_disk(at_peak=True)
    more = replace(HARVEST, n_tokens={**HARVEST.n_tokens, "train": 100_001})
    assert more.bytes_on_disk(at_peak=False) - HARVEST.bytes_on_disk(at_peak=False) == 512 * 4 + 24
    assert HARVEST.of_at_most(100_001) == HARVEST and HARVEST.of_at_most(5).n_tokens == {**HARVEST.n_tokens, "train": 5}


def test_time_and_flops_are_linear_in_tokens():
    once = phases(JOB)
    twice = phases(replace(JOB, n_steps=2000, n_rows=20_000, n_lm_tokens=8192, harvest=replace(
        HARVEST, n_tokens={split: 2 * n for split, n in HARVEST.n_tokens.items()})))
    assert set(once) == {"harvest", "training", "evaluation"}
    for name, phase in once.items():
        assert 0 < phase.seconds < float("inf") and phase.flops > 0
        once_only = _FIT_SECONDS if name == "training" else 0.0
        assert twice[name].seconds - once_only == pytest.approx(2 * (phase.seconds - once_only)), name
        assert twice[name].flops == pytest.approx(2 * phase.flops), name


def test_a_training_step_by_hand():
    """1,024 tokens: the encoder 4,096 latents each, 40 entries each, 4.2 million parameters, the loop; and AuxK's seven
    products with 3 % of the latents, at the encoder's rate for as many latents."""
    expected = 1024 * (4096 * 1e-9 + 40 * 1e-7) + 4_200_000 * 1e-9 + 2e-3 + 7 * 0.03 * 1024 * 4096 * 1e-9
    assert JOB.step_seconds(RATES) == pytest.approx(expected)
    slow_disk = replace(RATES, read=1e-6)
    assert JOB.step_seconds(slow_disk) == pytest.approx(1024 * 512 * 4 * 1e-6)


def test_a_start_and_a_calibration_by_hand():
    """Three passes over the rows of the start and five over the validation rows, 4,096 latents each."""
    none, both = (phases(job)["training"] for job in (JOB, replace(JOB, n_start_rows=1000, calibrated=True)))
    assert both.seconds - none.seconds == pytest.approx((3 * 1000 + 5 * 8192) * 4096 * 1e-9)
    assert both.flops - none.flops == pytest.approx((3 * 1000 + 5 * 8192) * 2 * 512 * 4096)


def test_passes_of_an_evaluation_by_hand():
    """Four batches of eight rows: without the activation, clean, spliced and with two gradients, the last three from
    the hook point's layer on; of a later job clean and spliced alone."""
    of_sae = 2 * (10_000 + 4096) * 512 * 4096
    whole, from_layer, gradient = 2 * 10**11, 11 * 10**10, 3 * 10**11
    first, later = (phases(replace(JOB, place_measured=done))["evaluation"] for done in (False, True))
    assert first.flops == pytest.approx(of_sae + 4 * (whole + 3 * from_layer + 2 * gradient))
    assert later.flops == pytest.approx(of_sae + 4 * 2 * from_layer)
    no_room = replace(JOB, n_lm_tokens=4096 * 1024, lm=replace(LM, stream_bytes=2**20), place_measured=True)
    assert phases(no_room)["evaluation"].flops == pytest.approx(
        2 * (10_000 + 4096 * 1024) * 512 * 4096 + 4096 * 2 * (whole - 9 * 10**10 * 512 / 4096))


def test_training_rows_on_the_fly_by_hand():
    """The language model reads those of the run, a buffer that is only begun, and twice a sample of 32,768."""
    held_out = replace(HARVEST, n_tokens={**HARVEST.n_tokens, "train": 1})
    text = Online(n_tokens=500_000, buffer_rows=65536)
    cached, online = (phases(replace(JOB, harvest=held_out, online=way))["training"] for way in (None, text))
    flops = (1000 * 1024 + 65536 + 2 * 32768) / (127 * 8) * 10**11
    assert online.flops - cached.flops == pytest.approx(flops)
    assert online.seconds - cached.seconds == pytest.approx(flops * 1e-11)
    shards = 2 * 10_000 * 512 * 4  # of the held-out rows: these, too, are no larger
    memory = (65536 + 3 * 127 * 8) * 512 * 4 + 500_000 * 12 + 2.5 * 10**8
    assert online.host_bytes - cached.host_bytes == pytest.approx(memory - shards)
    assert phases(replace(JOB, harvest=held_out, online=text))["harvest"].seconds < phases(JOB)["harvest"].seconds / 5


def test_several_devices_share_a_batch_and_not_the_parameters():
    two = replace(JOB, devices=2, sae=replace(SAE, batch=512, dense=Cost(5 * 10**10, 8 * 10**7)))
    assert JOB.step_seconds(RATES) / 2 < two.step_seconds(RATES) < JOB.step_seconds(RATES)
    gpu = replace(MACHINE, device_bytes=80 * GB)
    assert phases(two, gpu)["training"].device_bytes < phases(JOB, gpu)["training"].device_bytes
    one, both = (phases(job)["training"].host_bytes - GB for job in (JOB, two))  # one of them keeps the language model
    assert both > 1.9 * one - 0.2 * GB


def test_on_a_gpu_the_model_is_there_when_it_works_and_the_sae_when_it_trains():
    machine = replace(MACHINE, device_bytes=80 * GB)
    gpu = phases(JOB, machine)
    for phase in gpu.values():
        assert phase.device_bytes > GB and phase.host_bytes < phases(JOB)[phase.name].host_bytes + GB
    assert phases(JOB)["training"].device_bytes == 0
    online = phases(replace(JOB, online=Online(n_tokens=1000, buffer_rows=1)), machine)["training"]
    assert online.device_bytes - gpu["training"].device_bytes == GB + HARVEST.cost.peak_bytes  # weights and a pass
    assert phases(replace(JOB, lm=replace(LM, weight_bytes=2 * GB)), machine)["training"].host_bytes == (
        gpu["training"].host_bytes + GB)  # meanwhile it waits there


def test_jobs_of_a_sweep_share_their_caches_and_one_checkpoint_s_space():
    def plan(*keys, here=()):
        harvested = {key: ("a line about its rows",) for key in here}
        return Plan(MACHINE, [Planned(JOB, RATES)] * len(keys), keys, harvested, 0)

    alone, twice, other, done = plan("a"), plan("a", "a"), plan("a", "b"), plan("a", "a", here="a")
    assert twice.phases()["harvest"] == alone.phases()["harvest"]
    assert other.phases()["harvest"].seconds == 2 * alone.phases()["harvest"].seconds
    assert "harvest" not in done.phases()
    assert twice.phases()["training"].seconds == 2 * alone.phases()["training"].seconds
    assert twice.phases()["training"].host_bytes == alone.phases()["training"].host_bytes
    cache = HARVEST.bytes_on_disk(at_peak=True)
    assert twice.disk_bytes - alone.disk_bytes == SAE.parameter_bytes
    assert other.disk_bytes - twice.disk_bytes == cache == twice.disk_bytes - done.disk_bytes
    assert "on the disk already\n             a line about its rows\n" in text(done)
    assert "on the disk already" not in text(twice)


@pytest.mark.parametrize(("machine", "phase", "words"), [
    ({"free_disk_bytes": GB // 10}, None, "of disk are needed, 95.4 MiB are free"),
    ({"host_bytes": GB}, "harvest", "of memory, there are 954 MiB"),
    ({"device_bytes": 2 * GB}, "evaluation", "of device memory, there are 1.86 GiB"),
])
def test_what_does_not_fit_is_found(machine, phase, words):
    plan = Plan(MACHINE, [Planned(JOB, RATES)], ["a"], {}, 0)
    assert plan.shortages() == []
    shortages = replace(plan, machine=replace(MACHINE, **machine)).shortages()
    assert words in {shortage.phase: shortage.text for shortage in shortages}[phase]


def test_numbers_for_people():
    assert [size(n) for n in (512, 1023 * 1024, 104 * 2**40)] == ["512 B", "1023 KiB", "104 TiB"]
    assert [duration(s) for s in (3, 600, 90_000 * 3)] == ["3 s", "10.0 min", "3.1 days"]
