"""``evensong privacy``: what it says, what it draws, what it refuses."""

from __future__ import annotations

import re
import xml.etree.ElementTree
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting import pld
from served_coordinator import ServedCoordinator, trainable_artifact

from evensong.coordinator import AdaptiveClipping, Coordinator, Privacy, Task, TaskError, TaskState, privacy_command
from evensong.coordinator.privacy.accounting import Accounting
from evensong.v1 import task_pb2


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = privacy_command.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def figure(text: str, name: str) -> float:
    found = re.search(rf"{name}\s+([0-9.e+-]+)", text)
    assert found, text
    return float(found[1])


def test_a_plan_for_a_target_agrees_with_dp_accounting_called_directly(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "plan", "--target-epsilon", "8", "--rounds", "60", "--goal", "100")
    assert code == 0
    multiplier = figure(text, "noise multiplier")
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(multiplier), 60)
    direct = pld.PLDAccountant().compose(event).get_epsilon(1e-5)
    assert direct == pytest.approx(figure(text, "epsilon"), rel=1e-3)
    assert 7.99 < direct < 8.001


def test_a_sampled_plan_agrees_too(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rounds", "2250", "--goal", "40", "--population", "1000", "--sampling", "poisson"]
    code, text = run(capsys, "plan", "--noise-multiplier", "1.5", *options)
    assert code == 0
    assert figure(text, "epsilon") == pytest.approx(6.7688, abs=1e-3)
    assert figure(text, "by Renyi divergences") == pytest.approx(7.3293, abs=1e-3)
    assert "0.04" in text


@pytest.mark.parametrize("mechanism", ["distributed-gaussian", "distributed-skellam"])
def test_a_plan_with_noise_of_devices(capsys: pytest.CaptureFixture[str], mechanism: str) -> None:
    options = ["--rounds", "20", "--goal", "200", "--mechanism", mechanism, "--parameters", "10000", "--bits", "6"]
    code, text = run(capsys, "plan", "--target-epsilon", "6", *options)
    assert code == 0 and 5.99 < figure(text, "epsilon") <= 6.0
    assert figure(text, "noise of one device") > 3


def test_the_plot_is_a_picture_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "epsilon.svg"
    options = ["--rounds", "40", "--goal", "100", "--plot", str(path)]
    code, text = run(capsys, "plan", "--target-epsilon", "8", *options)
    assert code == 0 and "█" in text
    root = xml.etree.ElementTree.fromstring(path.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    (curve,) = (element for element in root.iter() if element.tag.endswith("polyline"))
    heights = [float(point.split(",")[1]) for point in curve.attrib["points"].split()]
    assert heights == sorted(heights, reverse=True) and len(heights) > 10  # it rises


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--delta", "0.02", "--noise-multiplier", "1"], "delta is out of range"),
        (["--noise-multiplier", "1", "--sampling", "poisson"], "larger population"),
        (["--noise-multiplier", "1", "--mechanism", "banded", "--min-separation", "2", "--bands", "3"], "taken back"),
        (["--target-epsilon", "1e-9", "--delta", "1e-12"], "no noise is enough"),
    ],
)
def test_a_plan_that_keeps_no_promise_is_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    code, text = run(capsys, "plan", "--rounds", "100", "--goal", "100", *options)
    assert code == 1 and reason in text


@pytest.mark.parametrize("options", [[], ["--noise-multiplier", "1", "--target-epsilon", "8"]])
def test_a_plan_asks_for_one_of_two(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    code, text = run(capsys, "plan", "--rounds", "100", "--goal", "100", *options)
    assert code == 2 and "either" in text


def test_the_text_plot_reaches_from_nothing_to_the_limit() -> None:
    lines = privacy_command.text_plot([0.0, 4.0, 8.0], limit=8.0, width=9, height=4)
    assert len(lines) == 4 and lines[0].startswith("    8") and lines[-1].startswith("    0")
    assert lines[0].endswith("█") and lines[-1][6] == " "


# --------------------------------------------------------------------------------------------- the engineer's whole way


def private_task(**fields: object) -> Task:
    settings = {"privacy": Privacy(epsilon=8, delta=1e-5), "secure": None, "clip_norm": 1.0, "goal": 2, "rounds": 3}
    settings |= {"over_selection": 1.0, "evaluate_every": 0, "strategy": "plain"} | fields
    return Task("private", trainable_artifact(), **settings)  # type: ignore[arg-type]


def test_a_task_computes_the_noise_that_its_rounds_need() -> None:
    plan = private_task().to_bundle().privacy
    accounting = Accounting(task_pb2.PRIVACY_MECHANISM_CENTRAL_GAUSSIAN, plan.noise_multiplier, 1e-5)
    assert 7.999 < accounting.epsilon(3) <= 8
    assert private_task().to_bundle().update.weighting == task_pb2.WEIGHTING_UNIFORM
    assert private_task(privacy=Privacy(noise_multiplier=9.0)).to_bundle().privacy.noise_multiplier == 9.0
    banded = private_task(privacy=Privacy(mechanism="banded", min_separation=2)).to_bundle().privacy
    assert (banded.bands, banded.min_separation) == (2, 2)


def test_under_privacy_adaptive_clipping_has_the_defaults_of_the_paper() -> None:
    update = private_task(goal=100, clip_norm=AdaptiveClipping()).to_bundle().update
    assert (update.adaptive_clipping.quantile, update.adaptive_clipping.rate) == (0.5, 0.2)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"clip_norm": None}, "noise without clipping"),
        ({"weighting": "examples"}, "weighs the same"),
        ({"privacy": Privacy(delta=0.5)}, "delta is out of range"),
        ({"privacy": Privacy(mechanism="laplace")}, "privacy.mechanism is unknown"),  # type: ignore[arg-type]
        ({"privacy": Privacy(mechanism="distributed-gaussian")}, "needs a secure sum"),
    ],
)
def test_a_task_that_keeps_no_promise_is_refused_before_any_noise_is_computed(
    fields: dict[str, object], reason: str
) -> None:
    with pytest.raises(TaskError, match=reason):
        private_task(**fields)


def test_what_is_spent_is_shown_and_the_task_ends_with_its_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ServedCoordinator(tmp_path / "data")
    try:
        with Coordinator.connect(server.address, server.token) as coordinator:
            multiplier = private_task().to_bundle().privacy.noise_multiplier
            privacy = Privacy(epsilon=8, delta=1e-5, noise_multiplier=multiplier)
            handle = coordinator.submit(private_task(privacy=privacy, rounds=9))
            server.enrol(str(coordinator.create_token(uses=2)), 2)
            for _ in range(3):
                server.contribute()
            assert handle.wait().state == TaskState.COMPLETE
            ledger = handle.privacy()
            assert [release.version for release in ledger.releases] == [1, 2, 3]
            assert 7.99 < ledger.epsilon <= 8 and ledger.delta == 1e-5
            assert "privacy budget is spent" in handle.status().message
            assert coordinator.privacy(population="default").releases == ledger.releases
        connection = ["--address", server.address, "--token-file", str(tmp_path / "data" / "operator.token")]
        code, text = run(capsys, "show", handle.task_id[:6], *connection, "--plot", str(tmp_path / "spent.svg"))
        assert code == 0 and "spent: epsilon 8 at delta 1e-05, of 8" in text and (tmp_path / "spent.svg").exists()
        code, text = run(capsys, "show", "--population", "default", *connection)
        assert code == 0 and "1 task together" in text
        assert run(capsys, "show", *connection)[0] == 2
    finally:
        server.stop()
