"""What takes long: `make test` leaves it out, `make test-all` runs it. Figures are seconds on one core."""
LONG = {
    "tests/test_benchmarks.py::test_parts[networks]": 30,
    "tests/test_demo.py::test_wheel_does_the_same_in_an_empty_folder": 27,
    "tests/test_distributed.py::test_ddp_is_one_process_and_fsdp_under_accelerate": 17, # torchrun stays
    "tests/test_distributed.py::test_a_process_that_stops_alone_ends_the_other": 1, # of the same launch
    "tests/test_demo.py::test_nobody_is_contacted": 40, # the small demo, which the next five look at
    "tests/test_demo.py::test_small_run_leaves_report_and_checkpoint": 1,
    "tests/test_demo.py::test_checkpoint_loads_again": 1,
    "tests/test_demo.py::test_second_run_reuses": 1,
    "tests/test_demo.py::test_checkpoint_of_another_task_is_refused": 1,
    "tests/test_demo.py::test_other_options_are_refused": 1,
    "tests/test_extract.py::test_torchrun_splits_the_work": 11,
    "tests/test_extract.py::test_two_processes_train_online_without_the_unreadable": 21,
    "tests/faults/test_kills.py::test_kill": 32,
    "tests/faults/test_kills.py::test_rank_hangs": 10,
    "nbs/13a_distributed.ipynb": 28, # tests/test_distributed.py stays
    "nbs/assets/tiny_encoders.ipynb": 28,
    "nbs/experiments/baselines.ipynb": 26,
    "nbs/experiments/bug_zoo.ipynb": 18, # tests/test_bugs.py has a test for each of its thirteen
    "nbs/tutorials/blip3o_checkpoint.ipynb": 25,
    "nbs/tutorials/four_tasks.ipynb": 25,
    "nbs/tutorials/from_pickles.ipynb": 25,
    "nbs/tutorials/laptop_to_cluster.ipynb": 21,
    "nbs/tutorials/linear_or_slerp.ipynb": 17,
    "nbs/tutorials/overfit_test.ipynb": 32,
    "nbs/tutorials/seed_commands.ipynb": 25,
    "nbs/tutorials/real_encoders.ipynb": 8,
    "nbs/tutorials/write_your_own.ipynb": 14,
    "nbs/tutorials/your_images.ipynb": 9,
}
FIRST = { # other notebooks that take long: they are started first, so that none is left alone at the end
    "nbs/03_encoders.ipynb": 18,
    "nbs/04_extract.ipynb": 20,
    "nbs/07_dit.ipynb": 29,
    "nbs/09_samplers.ipynb": 14,
    "nbs/12_learner.ipynb": 30,
    "nbs/12b_monitors.ipynb": 25,
    "nbs/13_inference.ipynb": 42,
    "nbs/13b_validation.ipynb": 17,
    "nbs/13e_training.ipynb": 16,
    "nbs/14_evaluate.ipynb": 19,
    "nbs/14a_report.ipynb": 34,
    "nbs/15_widgets.ipynb": 16,
    "nbs/16_cli.ipynb": 24,
    "nbs/16a_cli_eval.ipynb": 21,
}
