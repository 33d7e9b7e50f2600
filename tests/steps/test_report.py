"""The last table of a run, as it stands after Metaflow has printed it."""

from steps.report import report


def test_headings_stand_over_their_numbers_though_metaflow_strips_what_a_task_prints(capsys):
    evaluation = {
        "before": {"rows": 8, "loss": 5.2217, "perplexity": 185.2537},
        "after": {"rows": 8, "loss": 3.3874, "perplexity": 29.589},
    }
    report(evaluation=evaluation, before="before", after="after", export_uri="/runs/1/export")
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (heading,) = [line for line in lines if line.endswith("change")]
    (loss,) = [line for line in lines if line.startswith("loss")]
    for word, number in (("before", "5.222"), ("after", "3.387"), ("change", "-1.834")):
        assert heading.index(word) + len(word) == loss.index(number) + len(number)
    assert lines[-1] == "exported model: /runs/1/export"
