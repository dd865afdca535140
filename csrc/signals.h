// Signals such as Ctrl-C's, whose handlers Python runs when it is asked: a call of ours would else be over before that.
#pragma once

namespace throughtime {

// Called when the module is loaded.
void find_main_thread();

// Whether a handler has raised, which then is Python's error; to be asked without the GIL now and then, by the calling thread of a
// call that began there. Handlers run in Python's main thread alone, so elsewhere nothing is asked: a thread that wants the GIL
// while Python ends is ended itself, and with it the process.
using IsInterrupted = bool (*)();
IsInterrupted interruption();

}  // namespace throughtime
