/* signals.c: the flag behind signals.h. It is the one piece of state outside a struct that training has: a handler
 * is given nothing but the signal's number. Called by trainer.c. */
#include "train/signals.h"

#include <signal.h>
#include <stddef.h>
#include <string.h>

static volatile sig_atomic_t received;

static void raise_flag(int signal_number) {
    if (!received) received = signal_number;
    if (signal_number == SIGINT) signal(SIGINT, SIG_DFL); /* the next one ends the process */
}

void signals_install(void) {
    /* System calls go on after the handler: nobody waits for input, and a step has to be finished first. */
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = raise_flag;
    action.sa_flags = SA_RESTART;
    sigemptyset(&action.sa_mask);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
    /* Whoever started the program may have had them blocked, and that is inherited. */
    sigset_t ours;
    sigemptyset(&ours);
    sigaddset(&ours, SIGTERM);
    sigaddset(&ours, SIGINT);
    sigaddset(&ours, SIGUSR1);
    pthread_sigmask(SIG_UNBLOCK, &ours, NULL);
}

int signals_received(void) { return received; }

const char *signals_name(int signal_number) {
    switch (signal_number) {
    case SIGTERM: return "SIGTERM";
    case SIGINT: return "SIGINT";
    case SIGUSR1: return "SIGUSR1";
    default: return "a signal";
    }
}

void signals_restore(void) {
    signal(SIGTERM, SIG_DFL);
    signal(SIGINT, SIG_DFL);
    /* A launcher may have sent the same twice, and the second arrives when the run has been saved. */
    signal(SIGUSR1, received == SIGUSR1 ? SIG_IGN : SIG_DFL);
    received = 0;
}
