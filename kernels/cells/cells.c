/* cells.c: the list of cells. Each is filled in by its own compilation of kernels/cpu/each_cell.c. */
#include "kernels/cells/cells.h"

#include <stddef.h>
#include <string.h>

#define DECLARE(name) extern const struct cell cell_##name;
CELLS(DECLARE)

#define ADDRESS(name) [CELL_ID_##name] = &cell_##name,
const struct cell *const cells[] = {CELLS(ADDRESS)};

const struct cell *cell_find(const char *name) {
    for (int i = 0; i < CELL_COUNT; i++)
        if (strcmp(cells[i]->name, name) == 0) return cells[i];
    return NULL;
}
