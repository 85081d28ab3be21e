"A fastai Learner in one process"
