"A whole training: stopped, resumed, on one processor or many"
