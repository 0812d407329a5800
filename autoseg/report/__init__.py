"""The report: all of a run on one page, made from the files under work_dir alone; and `status` and `explain`."""
