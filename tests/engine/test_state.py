"""What a run knows of its progress."""

from __future__ import annotations

from horoyolo.engine.state import Progress


def scored(*fitnesses: float | None) -> Progress:
    progress = Progress()
    for epoch, fitness in enumerate(fitnesses):
        if fitness is not None:
            progress.score(epoch, fitness)
    return progress


def test_patience_ends_when_no_epoch_was_better() -> None:
    assert not scored(0.1, 0.5, 0.4, 0.4).out_of_patience(3)
    assert scored(0.1, 0.5, 0.4, 0.4, 0.3).out_of_patience(3)
    assert not scored(0.1, 0.5, 0.4, 0.4, 0.6).out_of_patience(3)
    assert not scored(0.5, *[0.1] * 500).out_of_patience(0)


def test_equal_scores_are_no_worse_but_not_the_best_again() -> None:
    progress = Progress()
    assert [progress.score(epoch, fitness) for epoch, fitness in enumerate((0.0, 0.0, 0.0, 0.2, 0.2))] == [True, False, False, True, False]
    assert (progress.best_epoch, progress.best_fitness) == (4, 0.2)
    assert not scored(*[0.0] * 10).out_of_patience(5)


def test_epochs_without_evaluation_use_up_no_patience_by_themselves() -> None:
    assert not scored(*[None] * 50).out_of_patience(5)
    assert not scored(*[None] * 50, 0.3).out_of_patience(5)
    assert scored(0.5, *[None] * 5, 0.3).out_of_patience(5)


def test_patience_survives_a_checkpoint() -> None:
    progress = Progress()
    progress.load_state_dict(scored(0.5, 0.1, 0.1).state_dict())
    assert progress.out_of_patience(2)
