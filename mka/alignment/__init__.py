"""How a merge is refitted: teacher and student in lockstep, each output layer fitted in closed form."""
