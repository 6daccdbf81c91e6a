/* signals.h: SIGTERM, SIGINT and SIGUSR1 ask a training run to save and stop.
 *
 * The handler only raises a flag, which the trainer reads at a step boundary. A second SIGINT ends the process at
 * once, as it would without riverrun: for people who don't want to wait.
 */
#ifndef RIVERRUN_SIGNALS_H
#define RIVERRUN_SIGNALS_H

void signals_install(void);
int signals_received(void);            /* the signal that asked first, or 0 */
const char *signals_name(int signal);  /* "SIGTERM" */
void signals_restore(void);            /* default actions again, flag cleared; SIGUSR1 is ignored if it was that */

#endif
