"""`tppo explore`: the planner as a local web page.

server.py has the routes, guard.py says whom they answer, asked.py turns a query string into a question, uploads.py
keeps what a user uploads, workers.py runs the simulations in processes that can be killed, work.py is what these do,
pictures.py is what the page draws. static/ is the page: hand-written, no build step, nothing from elsewhere.
"""
