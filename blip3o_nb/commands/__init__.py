"The console programs"
