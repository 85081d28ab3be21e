"The transformer"
