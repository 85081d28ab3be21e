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
    "nbs/7_runs/01_distributed.ipynb": 28, # tests/test_distributed.py stays
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
    "nbs/tutorials/which_pair.ipynb": 65,
    "nbs/tutorials/write_your_own.ipynb": 14,
    "nbs/tutorials/your_images.ipynb": 9,
}
FIRST = { # other notebooks that take long: they are started first, so that none is left alone at the end
    "nbs/3_features/03_pretrained.ipynb": 16,
    "nbs/3_features/08_extract.ipynb": 20,
    "nbs/2_network/02_dit.ipynb": 29,
    "nbs/1_flow/02_samplers.ipynb": 14,
    "nbs/4_training/02_learner.ipynb": 30,
    "nbs/4_training/03_monitors.ipynb": 25,
    "nbs/5_generation/01_pipeline.ipynb": 42,
    "nbs/7_runs/03_runs.ipynb": 30,
    "nbs/6_judging/03_evaluate.ipynb": 19,
    "nbs/6_judging/04_report.ipynb": 34,
    "nbs/5_generation/02_pixels.ipynb": 42,
    "nbs/5_generation/03_widgets.ipynb": 16,
    "nbs/5_generation/04_public_decoders.ipynb": 75, # tests/test_public_decoders.py stays
    "nbs/8_commands/02_cli.ipynb": 40,
    "nbs/experiments/wrong_tokens.ipynb": 55,
}
